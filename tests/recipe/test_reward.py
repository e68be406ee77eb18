"""Reward stages in a recipe: their place in the chain, and their fields."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.recipe import LoadedRecipe, RewardStage, expand_stages

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[RPOTrainerError]]

CHAIN = """\
model: {name_or_path: base}
defaults: {learning_rate: 1e-5, global_batch_size: 8}
stages:
  - name: sft
    kind: sft
    data: {train: [{path: sft.jsonl}]}
  - name: rm
    kind: reward
    objective: bradley_terry
    data: {train: [{path: pairs.jsonl}], eval_fraction: 0.1}
  - name: rm-more
    kind: reward
    objective: regression
    init: rm
    attributes: [helpfulness]
    data: {train: [{path: ratings.jsonl}]}
  - name: rpo
    kind: rpo
    beta: 0.1
    repeat: 2
    data: {train: [{path: pairs.jsonl}]}
"""


def test_the_policy_goes_on_from_the_last_policy(load: Load) -> None:
    stages = expand_stages(load(CHAIN).recipe)
    assert [(stage.name, stage.init) for stage in stages] == [
        ("sft", "model"),
        ("rm", "sft"),
        ("rm-more", "rm"),
        ("rpo-1", "sft"),
        ("rpo-2", "rpo-1"),
    ]
    assert stages[3].reference == "sft"  # type: ignore[union-attr]


def test_a_chain_of_reward_stages_alone_starts_from_the_model(load: Load) -> None:
    text = CHAIN.split("  - name: sft")[0] + "  - name: rm" + CHAIN.split("  - name: rm")[1]
    text += "  - name: two\n    kind: reward\n    objective: bradley_terry\n"
    stages = expand_stages(load(text + "    data: {train: [{path: p}]}\n").recipe)
    assert [stage.init for stage in stages] == ["model", "model"]


def test_defaults_of_a_reward_stage(load: Load) -> None:
    stage = load(CHAIN).recipe.stages[1]
    assert isinstance(stage, RewardStage)
    assert (stage.attributes, stage.reward_weights, stage.margin_scale) == (None, None, 0.0)


# replaced line, replacement, code, place, names and values in the message
PAIRS = "    data: {train: [{path: pairs.jsonl}], eval_fraction: 0.1}\n"
RATED = "    attributes: [helpfulness]\n"
BAD: dict[str, tuple[str, str, str, str, list[str]]] = {
    "a policy from a reward model": (
        "    repeat: 2\n",
        "    init: rm\n",
        "recipe.wrong-stage-kind",
        ":20 (stages.rpo.init)",
        ["`rm`"],
    ),
    "a reward model as reference": (
        "    repeat: 2\n",
        "    reference: rm-more\n",
        "recipe.wrong-stage-kind",
        ":20 (stages.rpo.reference)",
        ["`rm-more`"],
    ),
    "responses from a reward model": (
        "    objective: regression\n    init: rm\n    attributes: [helpfulness]\n"
        "    data: {train: [{path: ratings.jsonl}]}\n",
        "    objective: bradley_terry\n    init: rm\n"
        "    data: {train: [{path: p}], generate: {max_new_tokens: 9}, score: {verifier: exact}}\n",
        "recipe.wrong-stage-kind",
        ":14 (stages.rm-more.init)",
        ["`rm`"],
    ),
    "no attributes": (
        RATED,
        "",
        "recipe.missing-companion",
        ":11 (stages.rm-more.attributes)",
        ["`objective: regression`"],
    ),
    "an attribute twice": (
        RATED,
        "    attributes: [a, a]\n",
        "recipe.repeated-attribute",
        ":15 (stages.rm-more.attributes)",
        [],
    ),
    "margin of ratings": (
        RATED,
        RATED + "    margin_scale: 1.0\n",
        "recipe.unused-field",
        ":16 (stages.rm-more.margin_scale)",
        ["`objective: regression`"],
    ),
    "attributes of pairs": (
        PAIRS,
        RATED + PAIRS,
        "recipe.unused-field",
        ":10 (stages.rm.attributes)",
        ["`objective: bradley_terry`"],
    ),
    "range upside down": (
        RATED,
        RATED + "    rating_range: [4, 0]\n",
        "recipe.empty-range",
        ":16 (stages.rm-more.rating_range)",
        ["4 to 0"],
    ),
    "range of three": (
        RATED,
        RATED + "    rating_range: [0, 2, 4]\n",
        "recipe.invalid-value",
        ":16 (stages.rm-more.rating_range)",
        ["2", "3"],
    ),
    "no such weights": (
        RATED,
        RATED + "    reward_weights: nemotron\n",
        "rewards.unknown-weights",
        ":16 (stages.rm-more.reward_weights)",
        ["'nemotron'"],
    ),
    "weights of other attributes": (
        RATED,
        RATED + "    reward_weights: {depth: 1.0}\n",
        "rewards.wrong-attributes",
        ":16 (stages.rm-more.reward_weights)",
        ["helpfulness", "depth"],
    ),
    "published weights of other attributes": (
        RATED,
        RATED + "    reward_weights: llama3-70b-steerlm-rm\n",
        "rewards.wrong-attributes",
        ":16 (stages.rm-more.reward_weights)",
        ["correctness"],
    ),
    "policy evaluation": (
        PAIRS,
        PAIRS + "    eval: {data: [{path: p}]}\n",
        "recipe.unused-field",
        ":11 (stages.rm.eval)",
        [],
    ),
    "an adapter": (
        PAIRS,
        PAIRS + "    peft: {r: 4}\n",
        "recipe.unused-field",
        ":11 (stages.rm.peft)",
        [],
    ),
    "rounds": (
        PAIRS,
        PAIRS + "    repeat: 2\n",
        "recipe.unused-field",
        ":11 (stages.rm.repeat)",
        [],
    ),
    "two kinds of held-out rows": (
        "eval_fraction: 0.1}",
        "eval: [{path: p}], eval_fraction: 0.1}",
        "recipe.conflicting-fields",
        ":10 (stages.rm.data.eval_fraction)",
        ["`eval`"],
    ),
    "a fraction of 1": (
        "eval_fraction: 0.1}",
        "eval_fraction: 1.0}",
        "recipe.out-of-range",
        ":10 (stages.rm.data.eval_fraction)",
        ["1.0"],
    ),
    "filter of ratings": (
        "ratings.jsonl}]}",
        "ratings.jsonl}], filter: {min_gap: 1}}",
        "recipe.unused-field",
        ":16 (stages.rm-more.data.filter)",
        ["bradley_terry"],
    ),
    "replay": (
        "ratings.jsonl}]}",
        "ratings.jsonl}], replay: {stage: sft, fraction: 0.1}}",
        "recipe.unused-field",
        ":16 (stages.rm-more.data.replay)",
        [],
    ),
    "three responses": (
        "eval_fraction: 0.1}",
        "generate: {max_new_tokens: 9}, score: {verifier: exact}, pairs: {select: all_responses}}",
        "recipe.too-many-responses",
        ":10 (stages.rm.data.pairs.select)",
        ["`select: all_responses`", "`bradley_terry`"],
    ),
    "no objective": (
        "    objective: bradley_terry\n",
        "",
        "recipe.missing-field",
        ":7 (stages.rm.objective)",
        [],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_error_with_its_code_and_place(name: str, problems: Show) -> None:
    old, new, code, where, words = BAD[name]
    assert CHAIN.count(old) == 1
    (found,) = problems(CHAIN.replace(old, new))
    assert (found.code, found.where) == (code, f"chain.yaml{where}")
    assert [word for word in words if word not in str(found)] == [], found


def test_an_adapter_may_continue_after_a_reward_stage(load: Load) -> None:
    peft = "    peft: {r: 4, between_stages: keep}\n"
    text = CHAIN.replace(
        "    data: {train: [{path: sft.jsonl}]}\n", peft + "    data: {train: [{path: s}]}\n"
    )
    assert load(text.replace("    repeat: 2\n", peft)).recipe.stages[-1].peft is not None
