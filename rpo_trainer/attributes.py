"""Weights that combine the scores of several attributes into one reward, including published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rpo_trainer.errors import RecipeError

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

# Weights that the model cards recommend for a scalar reward. The attributes are HelpSteer2's, rated 0 to 4.
#   https://huggingface.co/nvidia/Nemotron-4-340B-Reward
#   https://huggingface.co/nvidia/Llama3-70B-SteerLM-RM
PRESETS: dict[str, dict[str, float]] = {
    "nemotron-4-340b-reward": dict(
        zip(HELPSTEER_ATTRIBUTES, (0.3, 0.74, 0.46, 0.47, -0.33), strict=True)
    ),
    "llama3-70b-steerlm-rm": dict(
        zip(HELPSTEER_ATTRIBUTES, (0.65, 0.8, 0.45, 0.55, -0.4), strict=True)
    ),
}


def resolve_weights(
    weights: str | Mapping[str, float] | None, attributes: Sequence[str]
) -> dict[str, float]:
    """Return the weight of each attribute, in their order.

    Args:
        weights: name of a preset, weights by attribute, or None for the mean of the attributes.

    Raises:
        RecipeError: unknown preset, missing or unknown attributes, or all weights are 0.
    """
    if weights is None:
        return {name: 1.0 / len(attributes) for name in attributes}
    if isinstance(weights, str):
        if weights not in PRESETS:
            raise RecipeError(
                f"unknown preset {weights!r}",
                code="rewards.unknown-weights",
                where="reward_weights",
                fix=f"use one of {', '.join(PRESETS)}, or a mapping of attribute: weight",
            )
        weights = PRESETS[weights]
    missing = [name for name in attributes if name not in weights]
    unknown = [name for name in weights if name not in attributes]
    if missing or unknown:
        faults = [f"no weight for {name}" for name in missing]
        faults += [f"a weight for {name}, which the model does not score" for name in unknown]
        raise RecipeError(
            "; ".join(faults),
            code="rewards.wrong-attributes",
            where="reward_weights",
            why=f"the attributes are {', '.join(attributes)}",
            fix="give every attribute a weight; 0 excludes it",
        )
    if not any(weights[name] for name in attributes):
        raise RecipeError(
            "all weights are 0",
            code="rewards.zero-weights",
            where="reward_weights",
            why="all rewards would be 0",
            fix="give at least one attribute a nonzero weight",
        )
    return {name: float(weights[name]) for name in attributes}
