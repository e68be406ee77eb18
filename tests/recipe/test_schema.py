from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rpo_trainer.recipe import (
    DPOStage,
    PeftSpec,
    Recipe,
    RPOStage,
    SFTStage,
    SourceSpec,
    json_schema,
)
from rpo_trainer.recipe.schema import STAGE_KINDS, Spec
from rpo_trainer.recipe.where import specs_in

DATA = {"train": [{"path": "a.jsonl"}]}
SFT = {"name": "s", "kind": "sft", "data": DATA, "global_batch_size": 4, "learning_rate": 1e-5}


def _all_specs() -> set[type[Spec]]:
    found: set[type[Spec]] = set()
    waiting: list[type[Spec]] = [Recipe]
    while waiting:
        spec = waiting.pop()
        found.add(spec)
        inner = [s for info in spec.model_fields.values() for s in specs_in(info.annotation)]
        waiting += [s for s in inner if s not in found]
    return found


def test_every_field_has_a_description_in_the_json_schema() -> None:
    schema = json_schema()
    for spec in _all_specs():
        shown = schema if spec is Recipe else schema["$defs"][spec.__name__]
        assert set(shown["properties"]) == set(spec.model_fields)
        # `peft` also accepts the fields of LoraConfig.
        assert shown["additionalProperties"] is (spec is PeftSpec)
        for name, field in shown["properties"].items():
            assert field.get("description"), f"{spec.__name__}.{name}"


def test_the_json_schema_lets_defaults_give_what_a_stage_lacks() -> None:
    schema = json_schema()
    for kind in STAGE_KINDS.values():
        assert schema["$defs"][kind.__name__]["required"] == ["name", "kind"]
    defaults = schema["properties"]["defaults"]
    assert defaults["additionalProperties"] is False
    assert {"beta", "reward_scale", "label_smoothing"} <= set(defaults["properties"])
    assert not {"name", "kind"} & set(defaults["properties"])
    losses = [choice["enum"] for choice in defaults["properties"]["loss_type"]["anyOf"]]
    assert losses == [["dpo", "ipo"], ["rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq", "rpo_sqloo"]]


def test_field_errors_and_cross_field_errors_come_together() -> None:
    with pytest.raises(ValidationError) as caught:
        SFTStage.model_validate({**SFT, "num_train_epochs": 1, "max_steps": 2, "optim": 3, "x": 1})
    assert {error["loc"] for error in caught.value.errors()} == {("max_steps",), ("optim",), ("x",)}


def test_integers_are_taken_for_floats_and_nothing_else_is_converted() -> None:
    stage = DPOStage.model_validate({**SFT, "kind": "dpo", "beta": 1})
    assert (stage.beta, type(stage.beta)) == (1.0, float)
    for wrong in ("1", True, None):
        with pytest.raises(ValidationError):
            DPOStage.model_validate({**SFT, "kind": "dpo", "beta": wrong})


def test_specs_can_be_made_in_python() -> None:
    stage = RPOStage(
        name="r",
        data={"train": [SourceSpec(path="a")]},  # type: ignore[arg-type]
        global_batch_size=4,
        learning_rate=1e-6,
        beta=0.1,
    )
    recipe = Recipe(model={"name_or_path": "m"}, stages=[stage])  # type: ignore[arg-type]
    assert recipe.stages == [stage]
    assert stage.num_train_epochs == 1.0
    again = Recipe.model_validate(recipe.model_dump())
    assert again == recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_batch_size", 0),
        ("micro_batch_size", 0),
        ("micro_batch_tokens", -1),
        ("max_length", 1),
        ("num_train_epochs", 0),
        ("max_steps", 0),
        ("learning_rate", 0),
        ("learning_rate", 3e7),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("adam_beta1", 1),
        ("adam_beta2", -0.1),
        ("max_grad_norm", -1),
        ("logging_steps", 0),
        ("save_steps", 0),
        ("save_total_limit", 0),
        ("eval_steps", 0),
        ("seed", -1),
        ("repeat", 0),
        ("truncation", "none"),
        ("name", ""),
        ("init", ""),
    ],
)
def test_values_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        SFTStage.model_validate({**SFT, field: value})
    assert {error["loc"] for error in caught.value.errors()} == {(field,)}


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 2**32])
@pytest.mark.parametrize("place", ["recipe", "stage", "task"])
def test_seeds_have_32_bits_everywhere(place: str, seed: int) -> None:
    stage: dict[str, Any] = dict(SFT)
    task = {"task": "quickstart/code", "size": 3}
    stage["data"] = {"train": [{**task, "seed": seed} if place == "task" else task]}
    stage |= {"seed": seed} if place == "stage" else {}
    recipe = {"model": {"name_or_path": "m"}, "stages": [stage]}
    recipe |= {"seed": seed} if place == "recipe" else {}
    if seed < 2**32:
        Recipe.model_validate(recipe)
        return
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(recipe)
    assert {error["loc"][-1] for error in caught.value.errors()} == {"seed"}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ({"replay": {"stage": "s", "fraction": 1.0}}, "fraction"),
        ({"replay": {"stage": "s", "fraction": 0}}, "fraction"),
        ({"filter": {"min_gap": -1}}, "min_gap"),
        ({"filter": {"min_chosen_reward": float("nan")}}, "min_chosen_reward"),
        ({"score": {"verifier": "guess"}}, "verifier"),
        ({"pairs": {"select": "worst"}}, "select"),
        ({"pairs": {"min_gap": -1}}, "min_gap"),
        ({"train": [{"path": "a", "weight": 0}]}, "weight"),
        ({"train": [{"path": "a", "max_rows": 0}]}, "max_rows"),
    ],
)
def test_data_out_of_range(part: dict[str, object], value: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DPOStage.model_validate({**SFT, "kind": "dpo", "beta": 1, "data": {**DATA, **part}})
    assert value in {error["loc"][-1] for error in caught.value.errors()}


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0}, {"top_p": 1.1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}],
)
def test_generation_out_of_range(change: dict[str, float]) -> None:
    generate = {"max_new_tokens": 5, **change}
    data = {**DATA, "generate": generate, "score": {"verifier": "exact"}}
    with pytest.raises(ValidationError) as caught:
        DPOStage.model_validate({**SFT, "kind": "dpo", "beta": 1, "data": data})
    assert {error["loc"][-1] for error in caught.value.errors()} == set(change)
