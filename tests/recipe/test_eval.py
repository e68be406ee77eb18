"""`eval` in a recipe: what is refused, and what it may name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.recipe import LoadedRecipe, dump_resolved, load_recipe

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[RPOTrainerError]]

CHAIN = """\
model: {{name_or_path: base}}
defaults: {{learning_rate: 1e-5, global_batch_size: 8}}
eval: {recipe}
stages:
  - name: sft
    kind: sft
    data: {{train: [{{path: sft.jsonl}}]}}
    eval: {sft}
  - name: rm
    kind: reward
    objective: bradley_terry
    data: {{train: [{{path: pairs.jsonl}}]}}
  - name: rpo
    kind: rpo
    beta: 0.1
    repeat: 2
    data: {{train: [{{path: pairs.jsonl}}]}}
    eval: {rpo}
"""
RESPONSES = "data: [{path: e.jsonl}], generate: {max_new_tokens: 3}, score: {verifier: exact}"
BY_RM = "data: [{path: e.jsonl}], generate: {max_new_tokens: 3}, score: {model: rm}"
PAIRS = "preferences: [{path: p.jsonl}]"
TASKS = "lm_eval: {tasks: [gsm8k], limit: 5}"


def chain(recipe: str = "null", sft: str = "null", rpo: str = "null") -> str:
    return CHAIN.format(recipe=recipe, sft=sft, rpo=rpo)


@pytest.mark.parametrize(
    ("spec", "code", "field"),
    [
        ("{}", "recipe.missing-field", ""),
        ("{max_rows: 3}", "recipe.missing-field", ""),
        ("{score: {verifier: exact}, " + PAIRS + "}", "recipe.missing-companion", ".score"),
        (
            "{data: [{path: e}], generate: {max_new_tokens: 3}}",
            "recipe.missing-companion",
            ".generate",
        ),
        (
            "{generate: {max_new_tokens: 3}, score: {verifier: exact}, " + PAIRS + "}",
            "recipe.missing-companion",
            ".generate",
        ),
        (
            "{" + RESPONSES.replace("3}", "3, policies: [sft]}") + "}",
            "recipe.unused-field",
            ".generate.policies",
        ),
        (
            "{" + RESPONSES.replace("3}", "3, with_ground_truth: true}") + "}",
            "recipe.unused-field",
            ".generate.with_ground_truth",
        ),
        ("{" + TASKS + ", baseline: sft}", "recipe.missing-companion", ".baseline"),
        ("{" + PAIRS + ", baseline: stf}", "recipe.unknown-stage", ".baseline"),
        ("{" + PAIRS + ", baseline: rpo}", "recipe.unknown-stage", ".baseline"),
        ("{" + PAIRS + ", baseline: rm}", "recipe.later-stage", ".baseline"),
        ("{" + BY_RM + "}", "recipe.later-stage", ".score.model"),
        ("{nll: [{path: a, weight: 1}, {path: b}]}", "recipe.missing-weight", ".nll.1"),
        ("{lm_eval: {tasks: []}}", "recipe.empty-field", ".lm_eval.tasks"),
        ("{lm_eval: {tasks: [gsm8k], shots: 3}}", "recipe.unknown-key", ".lm_eval.shots"),
    ],
)
def test_what_is_refused(problems: Show, spec: str, code: str, field: str) -> None:
    (found,) = problems(chain(spec))
    assert (found.code, found.where) == (code, f"chain.yaml:3 (eval{field})")


def test_a_stage_is_compared_with_what_is_there(problems: Show) -> None:
    (found,) = problems(chain(sft="{" + PAIRS + ", baseline: rpo-1}"))
    assert found.code == "recipe.later-stage" and "`rpo-1`" in found.what
    assert found.where == "chain.yaml:8 (stages.sft.eval.baseline)"


@pytest.mark.parametrize(
    "specs",
    [
        {"recipe": "{" + RESPONSES + ", baseline: model}"},
        {"recipe": "{" + PAIRS + ", baseline: rpo-1}"},  # earlier stages are not compared
        {"recipe": "{" + PAIRS + ", baseline: ./elsewhere}"},
        {"rpo": "{" + BY_RM + ", baseline: sft}"},
        {
            "recipe": "{" + BY_RM + "}",
            "sft": "{" + PAIRS + "}",
        },  # all stages that it applies to come later
        {"recipe": "{" + BY_RM.replace("rm}", "./rm}") + ", " + TASKS + "}"},
        {"recipe": "{" + BY_RM.replace("{model: rm}", "{judge: {url: http://u, model: m}}") + "}"},
        {"recipe": "{nll: [{path: a}], " + TASKS + "}"},
    ],
)
def test_what_is_taken(load: Load, tmp_path: Path, specs: dict[str, str]) -> None:
    recipe = load(chain(**specs)).recipe
    (tmp_path / "resolved.yaml").write_text(dump_resolved(recipe))
    again = load_recipe(tmp_path / "resolved.yaml").recipe
    assert again.eval == recipe.eval
    evals = [stage.eval for stage in recipe.stages for _ in range(stage.repeat)]
    assert [stage.eval for stage in again.stages] == evals
