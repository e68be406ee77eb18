"""`eval` in a recipe: what is refused, and what it may name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rpo_trainer.recipe import LoadedRecipe, dump_resolved, load_recipe

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[str]]

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
    ("spec", "message"),
    [
        ("{}", "`eval` measures nothing"),
        ("{max_rows: 3}", "`eval` measures nothing"),
        ("{score: {verifier: exact}, " + PAIRS + "}", "`score` without `generate`"),
        (
            "{data: [{path: e}], generate: {max_new_tokens: 3}}",
            "`generate` without `score`: nobody would look at the responses",
        ),
        (
            "{generate: {max_new_tokens: 3}, score: {verifier: exact}, " + PAIRS + "}",
            "`generate` without `data`: there are no prompts",
        ),
        ("{" + RESPONSES.replace("3}", "3, policies: [sft]}") + "}", "not from `policies`"),
        (
            "{" + RESPONSES.replace("3}", "3, with_ground_truth: true}") + "}",
            "not from `with_ground_truth`",
        ),
        ("{" + TASKS + ", baseline: sft}", "`baseline`, and nothing is compared with it"),
        ("{" + PAIRS + ", baseline: stf}", "`eval.baseline` refers to `stf`, which is not a stage"),
        ("{" + PAIRS + ", baseline: rpo}", "`eval.baseline` refers to `rpo`, which is not a stage"),
        ("{" + PAIRS + ", baseline: rm}", "`eval.baseline` refers to `rm`"),
        ("{" + BY_RM + "}", "`score.model` is stage `rm`, which comes after a stage"),
        ("{nll: [{path: a, weight: 1}, {path: b}]}", "this source has no `weight`"),
        ("{lm_eval: {tasks: []}}", "eval.lm_eval.tasks"),
        ("{lm_eval: {tasks: [gsm8k], shots: 3}}", "shots"),
    ],
)
def test_what_is_refused(problems: Show, spec: str, message: str) -> None:
    shown = problems(chain(spec))
    assert any(message in line for line in shown), shown


def test_a_stage_is_compared_with_what_is_there(problems: Show) -> None:
    shown = problems(chain(sft="{" + PAIRS + ", baseline: rpo-1}"))
    assert any("refers to `rpo-1`, which is not earlier in the chain" in line for line in shown)


@pytest.mark.parametrize(
    "specs",
    [
        {"recipe": "{" + RESPONSES + ", baseline: model}"},
        {
            "recipe": "{" + PAIRS + ", baseline: rpo-1}"
        },  # stages before it are compared with nothing
        {"recipe": "{" + PAIRS + ", baseline: ./elsewhere}"},
        {"rpo": "{" + BY_RM + ", baseline: sft}"},
        {"recipe": "{" + BY_RM + "}", "sft": "{" + PAIRS + "}"},  # all that it holds for come later
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
