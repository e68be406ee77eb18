"""`peft` in a recipe: typed fields, fields of LoraConfig, and one adapter through several stages."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.recipe import LoadedRecipe, dump_resolved, expand_stages

Load = Callable[..., LoadedRecipe]
Problems = Callable[..., list[RPOTrainerError]]


def with_peft(valid: str, **stages: str) -> str:
    """The recipe with a `peft` line in each named stage."""
    for name, peft in stages.items():
        valid = re.sub(rf"(- name: {name.replace('_', '-')}\n)", rf"\1    peft: {peft}\n", valid)
    return valid


def test_lora_fields_are_let_through_and_ours_are_typed(load: Load, valid: str) -> None:
    recipe = load(
        with_peft(valid, dpo="{r: 4, target_modules: [q_proj], between_stages: keep}")
    ).recipe
    stage = next(s for s in expand_stages(recipe) if s.name == "dpo")
    assert stage.peft is not None
    assert stage.peft.lora_fields() == {"r": 4, "target_modules": ["q_proj"]}
    assert (stage.peft.between_stages, stage.peft.merge, stage.peft.quantization) == (
        "keep", None, None,
    )  # fmt: skip
    assert "between_stages: keep" in dump_resolved(recipe) and "r: 4" in dump_resolved(recipe)


@pytest.mark.parametrize(
    ("peft", "code", "field"),
    [
        ("{between_stages: both}", "recipe.invalid-choice", ".between_stages"),
        ("{quantization: int8}", "recipe.invalid-choice", ".quantization"),
        ("{merge: yes please}", "recipe.wrong-type", ".merge"),
        ("[q_proj]", "recipe.wrong-type", ""),
    ],
)
def test_values_of_ours_are_checked(
    peft: str, code: str, field: str, problems: Problems, valid: str
) -> None:
    (problem,) = problems(with_peft(valid, dpo=peft))
    assert (problem.code, problem.where) == (code, f"chain.yaml:16 (stages.dpo.peft{field})")


def test_merge_false_contradicts_merging(problems: Problems, valid: str) -> None:
    (problem,) = problems(with_peft(valid, dpo="{r: 4, merge: false}"))
    assert problem.code == "recipe.conflicting-fields"
    assert problem.where == "chain.yaml:16 (stages.dpo.peft.merge)"


KEEP = "{r: 4, between_stages: keep}"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (KEEP, "{r: 8, between_stages: keep}", ["`r: 4`", "`8`"]),
        (KEEP, "{r: 4, use_dora: true}", ["`use_dora: null`", "`True`"]),
        ("{r: 4, between_stages: keep, use_dora: true}", KEEP, ["`use_dora: True`", "`null`"]),
        (KEEP, "{r: 4, quantization: nf4}", ["`quantization: null`", "`nf4`"]),
    ],
)
def test_a_kept_adapter_stays_what_it_is(
    before: str, after: str, words: list[str], problems: Problems, valid: str
) -> None:
    (problem,) = problems(with_peft(valid, sft=before, dpo=after))
    assert problem.code == "recipe.changed-adapter"
    assert [word for word in ["sft", *words] if word not in problem.what] == []


@pytest.mark.parametrize(
    "stages",
    [
        {"sft": KEEP, "dpo": "{r: 4}", "rpo": "{r: 8}"},  # merged at the end of dpo
        {"sft": KEEP, "dpo": "{r: 4, between_stages: keep, merge: true}", "rpo": KEEP},
        {"code_sft": KEEP, "dpo": "{r: 16}"},  # sft, between them, trains all weights
        {"sft": "{r: 4}", "dpo": "{r: 8}"},
        {"sft": "{r: 4, quantization: nf4}", "dpo": "{r: 4}"},
        {"sft": "{r: 4, quantization: nf4, between_stages: keep}",
         "dpo": "{r: 4, quantization: nf4}"},
        {"rpo": "{r: 4, quantization: nf4, between_stages: keep}"},
    ],
)  # fmt: skip
def test_what_may_follow_what(stages: dict[str, str], load: Load, valid: str) -> None:
    assert load(with_peft(valid, **stages))


def test_the_start_may_be_named(problems: Problems, valid: str) -> None:
    text = with_peft(valid, code_sft=KEEP, dpo="{r: 8}").replace(
        "kind: dpo", "kind: dpo\n    init: code-sft"
    )
    (problem,) = problems(text)
    assert problem.code == "recipe.changed-adapter" and "code-sft" in problem.what


@pytest.mark.parametrize(
    "stages",
    [
        {"sft": "{r: 4, quantization: nf4}", "dpo": "{r: 4, quantization: nf4}"},
        {"rpo": "{r: 4, quantization: nf4}"},  # three rounds
    ],
)
def test_merged_4_bit_weights_are_not_quantized_again(
    stages: dict[str, str], problems: Problems, valid: str
) -> None:
    (problem,) = problems(with_peft(valid, **stages))
    assert problem.code == "recipe.requantized-weights"
    assert "`between_stages: keep`" in str(problem.fix)


def test_random_weights_are_not_quantized(problems: Problems, valid: str) -> None:
    random: Any = valid.replace(
        "name_or_path: base", "from_config: {model_type: llama}\n  tokenizer: characters"
    )
    (problem,) = problems(with_peft(random, code_sft="{quantization: nf4}"))
    assert problem.code == "recipe.quantized-random-weights"
