"""The `peft` part of a stage: which adapter is trained, and what becomes of it at the stage's end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic_core import InitErrorDetails

from rpo_trainer.recipe.chain_checks import expanded_names
from rpo_trainer.recipe.checks import wrong
from rpo_trainer.recipe.spec import Spec

_AT_THE_END = ("between_stages", "merge")  # may differ between stages that one adapter goes through


class PeftSpec(Spec):
    """An adapter in place of all weights; every other key is a field of `peft.LoraConfig`."""

    model_config = ConfigDict(extra="allow")

    between_stages: Literal["merge", "keep"] = Field(
        "merge",
        description="`merge`: the adapter is merged into the weights at the end of the stage, and the "
        "next one starts from those; `keep`: the next stage trains the adapter itself further",
    )
    merge: bool | None = Field(
        None,
        description="with `between_stages: keep`: write the merged model too, to `merged` beside the "
        "adapter",
    )
    quantization: Literal["nf4"] | None = Field(
        None, description="hold the frozen weights in 4 bits (QLoRA); needs bitsandbytes"
    )

    def lora_fields(self) -> dict[str, Any]:
        """What is `peft.LoraConfig`'s."""
        return dict(self.model_extra or {})

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        if raw.get("between_stages", "merge") == "merge" and raw.get("merge") is False:
            yield wrong(
                ("merge",),
                "`merge: false` contradicts `between_stages: merge`",
                why="the next stage starts from the merged model",
                fix="remove it, or write `between_stages: keep`",
            )


def peft_chain_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Errors between a stage with an adapter and what it starts from; `raw` is the recipe."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return
    for index, stage in enumerate(stages):
        peft = stage.get("peft") if isinstance(stage, dict) else None
        if not isinstance(peft, dict):
            continue
        at = ("stages", index, "peft")
        source = _start(index, stages)
        before = source.get("peft") if source is not None else None
        if isinstance(before, dict) and source is not None:
            yield from _after_an_adapter(at, peft, before, str(source.get("name")))
        if not peft.get("quantization"):
            continue
        if _merges(peft) and isinstance(stage.get("repeat"), int) and stage["repeat"] > 1:
            yield _rounded_away((*at, "between_stages"), "each round")
        model = raw.get("model")
        random = isinstance(model, dict) and model.get("from_config") is not None
        if random and source is None and _starts_from_model(index, stage):
            yield wrong(
                (*at, "quantization"),
                "`quantization` of a model with random weights",
                why="there is nothing in them worth keeping in 4 bits",
                fix="remove it, or start from a model with `name_or_path`",
            )


def _after_an_adapter(
    at: tuple[str | int, ...], peft: Mapping[str, Any], before: Mapping[str, Any], name: str
) -> Iterator[InitErrorDetails]:
    if _merges(before):
        if before.get("quantization") and peft.get("quantization"):
            yield _rounded_away((*at, "quantization"), f"what stage {name} has learnt")
        return
    for field in dict.fromkeys([*before, *peft]):
        old, new = before.get(field), peft.get(field)
        if field in _AT_THE_END or old == new:
            continue
        yield wrong(
            (*at, field) if field in peft else at,
            f"this stage trains the adapter of stage {name} further, with `{field}: {_text(old)}`, "
            f"not `{_text(new)}`",
            why=f"stage {name} has `between_stages: keep`",
            fix=f"give both stages the same `peft`, or write `between_stages: merge` in {name}",
        )


def _rounded_away(at: tuple[str | int, ...], what: str) -> InitErrorDetails:
    return wrong(
        at,
        f"4-bit weights that come from merged 4-bit weights: {what} would be rounded away",
        why="merged weights lie close to the levels of the 4-bit grid they came from, and quantising "
        "them again moves most of them back to those",
        fix="write `between_stages: keep` in the stage before (and here): the adapter is then not merged",
    )


def _merges(peft: Mapping[str, Any]) -> bool:
    return bool(peft.get("between_stages", "merge") == "merge")


def _text(value: object) -> str:
    return "null" if value is None else str(value)


def _starts_from_model(index: int, stage: Mapping[str, Any]) -> bool:
    return stage.get("init", "previous") in (("previous", "model") if index == 0 else ("model",))


def _start(index: int, stages: Sequence[Any]) -> Mapping[str, Any] | None:
    """The stage that a stage starts from; None: a model, or something wrong that is reported elsewhere."""
    target = stages[index].get("init", "previous")
    # No policy starts from a reward stage.
    earlier = [s for s in stages[:index] if isinstance(s, dict) and s.get("kind") != "reward"]
    if target == "previous":
        return earlier[-1] if earlier else None
    named = (s for s in earlier if isinstance(s.get("name"), str))
    return next((s for s in named if target in (s["name"], *expanded_names(s))), None)
