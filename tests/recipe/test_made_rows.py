"""generate, score, pairs, refresh and responses_from in a recipe: what is refused, and what rounds become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rpo_trainer.recipe import LoadedRecipe, dump_resolved, expand_stages, load_recipe

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[str]]

CHAIN = """\
model: {{name_or_path: base}}
defaults: {{learning_rate: 1e-5, global_batch_size: 8}}
stages:
  - name: sft
    kind: sft
    data: {{train: [{{path: sft.jsonl}}]}}
  - name: rm
    kind: reward
    objective: bradley_terry
    data: {{train: [{{path: pairs.jsonl}}]}}
  - name: dpo
    kind: dpo
    beta: 0.1
    data: {{train: [{{path: prompts.jsonl}}], {dpo}}}
  - name: rpo
    kind: rpo
    beta: 0.1
    repeat: 3
    data: {{train: [{{path: prompts.jsonl}}], {rpo}}}
"""
GENERATE = "generate: {max_new_tokens: 5}"
MADE = f"{GENERATE}, score: {{model: rm}}"


def chain(dpo: str = MADE, rpo: str = MADE) -> str:
    return CHAIN.format(dpo=dpo, rpo=rpo)


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        ("score: {}", "names no scorer"),
        ("score: {verifier: exact, model: rm}", "both `verifier` and `model`"),
        ("score: {verifier: asserts}", "runs code that a model has written"),
        (
            "score: {verifier: exact, allow_code_execution: true}",
            "`allow_code_execution` with the verifier `exact`",
        ),
        ("score: {model: rm, allow_code_execution: true}", "belongs to `verifier`, not to `model`"),
        ("score: {verifier: exact, weights: {a: 1.0}}", "belongs to `model` or `endpoint`"),
        ("score: {verifier: exact, batch_tokens: 5}", "belongs to `model`"),
        ("score: {model: nobody}", "refers to `nobody`, which is not a stage"),
        ("score: {model: rpo}", "not earlier in the chain"),
        ("score: {model: sft}", "cannot be `sft`, a stage of kind sft"),
        ("score: {endpoint: {url: 'http://x'}}", "model"),
        ("filter: {min_chosen_reward: 1, keep_top_fraction: 0.5}", "`filter` has both"),
        ("filter: {min_chosen_quantile: 0.5, keep_top_fraction: 0.5}", "`filter` has both"),
        ("filter: {keep_top_fraction: 0.0}", "keep_top_fraction"),
        ("filter: {min_chosen_quantile: 1.0}", "min_chosen_quantile"),
        ("resample: once", "`resample` without `generate`"),
        ("responses_from: sft", "cannot be `sft`, a stage of kind sft"),
        (
            f"responses_from: sft, {GENERATE}, score: {{model: rm}}",
            "`generate` beside `responses_from`",
        ),
        ("responses_from: rpo", "`train` beside `responses_from`"),
        (
            "generate: {max_new_tokens: 5, policies: []}, score: {model: rm}",
            "there is nobody to sample from",
        ),
        (
            "generate: {max_new_tokens: 5, policies: [rm]}, score: {model: rm}",
            "a stage of kind reward",
        ),
        (
            "generate: {max_new_tokens: 5, policies: [stf]}, score: {model: rm}",
            "did you mean `sft`?",
        ),
    ],
)
def test_what_is_refused(problems: Show, dpo: str, message: str) -> None:
    shown = problems(chain(dpo))
    assert any(message in line for line in shown), shown


def test_rows_of_a_stage_that_samples_none(problems: Show) -> None:
    shown = problems(chain("filter: {min_gap: 1}", "responses_from: dpo"))
    assert any("refers to `dpo`, which samples no responses" in line for line in shown)


@pytest.mark.parametrize("value", ["0", "-1.0", "automatic", "true", "[1]"])
def test_reward_scale_is_a_number_or_auto(problems: Show, value: str) -> None:
    text = chain().replace("    repeat: 3\n", f"    repeat: 3\n    reward_scale: {value}\n")
    (shown,) = problems(text)
    assert "must be a number above 0, or `auto`" in shown


def rounds(load: Load, text: str, words: Sequence[str] = ()) -> list[tuple[object, ...]]:
    return [
        (s.name, s.data.generate is not None, s.data.score is not None, s.data.responses_from)
        for s in expand_stages(load(text, words).recipe)[3:]
    ]


def test_each_round_samples_again_or_takes_the_rows_of_the_first(load: Load) -> None:
    again = [(f"rpo-{n}", True, True, None) for n in (1, 2, 3)]
    assert rounds(load, chain()) == again
    assert rounds(load, chain(), ["stages.rpo.data.resample=every_round"]) == again
    assert rounds(load, chain(), ["stages.rpo.data.resample=once"]) == [
        ("rpo-1", True, True, None),
        ("rpo-2", False, False, "rpo-1"),
        ("rpo-3", False, False, "rpo-1"),
    ]


def test_names_of_repeated_stages_are_those_that_run(load: Load) -> None:
    text = chain().replace("  - name: sft\n", "  - name: sft\n    repeat: 2\n")
    text += "  - {name: last, kind: dpo, beta: 0.1, data: {responses_from: rpo}}\n"
    words = ["stages.dpo.data.generate.policies=[init, sft, model, ./other]"]
    stages = {s.name: s for s in expand_stages(load(text, words).recipe)}
    generate = stages["dpo"].data.generate
    assert generate is not None
    assert generate.policies == ["init", "sft-2", "model", "./other"]
    assert stages["last"].data.responses_from == "rpo-3"


SCORES = [
    "score: {verifier: numeric}",
    "score: {verifier: asserts, allow_code_execution: true}",
    "score: {model: rm, weights: {reward: 2.0}, batch_tokens: 512}",
    "score: {endpoint: {url: 'http://x/v1', model: m}, weights: nemotron-4-340b-reward}",
    "score: {judge: {url: 'http://x/v1', model: m, template: t.txt, concurrency: 2}}",
]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("resample", ["", "resample: once, ", "resample: every_round, "])
def test_the_resolved_recipe_is_a_recipe_with_the_same_stages(
    load: Load, tmp_path: Path, score: str, resample: str
) -> None:
    made = f"{GENERATE}, {resample}{score}, pairs: {{select: all_pairs, ties: keep}}"
    text = chain(rpo=made).replace("repeat: 3", "repeat: 3\n    reward_scale: auto")
    text += (
        "eval: {data: [{path: e.jsonl}], generate: {max_new_tokens: 3}, score: {verifier: regex}}\n"
    )
    recipe = load(text).recipe
    (tmp_path / "resolved.yaml").write_text(dump_resolved(recipe))
    again = load_recipe(tmp_path / "resolved.yaml").recipe
    assert expand_stages(again) == expand_stages(recipe)
