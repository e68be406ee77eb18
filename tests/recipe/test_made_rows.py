"""generate, score, pairs, resample and responses_from in a recipe: errors, and the expansion of rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.recipe import LoadedRecipe, dump_resolved, expand_stages, load_recipe

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[RPOTrainerError]]

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


MADE_BY_POLICIES = "generate: {{max_new_tokens: 5, policies: {}}}, score: {{model: rm}}"


@pytest.mark.parametrize(
    ("dpo", "code", "field"),
    [
        ("score: {}", "recipe.missing-field", "score.verifier"),
        ("score: {verifier: exact, model: rm}", "recipe.conflicting-fields", "score.model"),
        ("score: {verifier: asserts}", "recipe.code-execution-not-allowed", "score.verifier"),
        (
            "score: {verifier: exact, allow_code_execution: true}",
            "recipe.unused-field",
            "score.allow_code_execution",
        ),
        (
            "score: {model: rm, allow_code_execution: true}",
            "recipe.unused-field",
            "score.allow_code_execution",
        ),
        ("score: {verifier: exact, weights: {a: 1.0}}", "recipe.unused-field", "score.weights"),
        (
            "score: {judge: {url: 'http://x', model: m}, weights: {a: 1.0}}",
            "recipe.unused-field",
            "score.weights",
        ),
        ("score: {verifier: exact, batch_tokens: 5}", "recipe.unused-field", "score.batch_tokens"),
        ("score: {model: nobody}", "recipe.unknown-stage", "score.model"),
        ("score: {model: rpo}", "recipe.later-stage", "score.model"),
        ("score: {model: sft}", "recipe.wrong-stage-kind", "score.model"),
        ("score: {endpoint: {url: 'http://x'}}", "recipe.missing-field", "score.endpoint.model"),
        (
            "score: {endpoint: {url: 'ftp://x', model: m}}",
            "recipe.invalid-url",
            "score.endpoint.url",
        ),
        (
            "filter: {min_chosen_reward: 1, keep_top_fraction: 0.5}",
            "recipe.conflicting-fields",
            "filter.keep_top_fraction",
        ),
        (
            "filter: {min_chosen_quantile: 0.5, keep_top_fraction: 0.5}",
            "recipe.conflicting-fields",
            "filter.keep_top_fraction",
        ),
        ("filter: {keep_top_fraction: 0.0}", "recipe.out-of-range", "filter.keep_top_fraction"),
        ("filter: {min_chosen_quantile: 1.0}", "recipe.out-of-range", "filter.min_chosen_quantile"),
        ("resample: once", "recipe.missing-companion", "resample"),
        ("responses_from: sft", "recipe.wrong-stage-kind", "responses_from"),
        (
            f"responses_from: sft, {GENERATE}, score: {{model: rm}}",
            "recipe.conflicting-fields",
            "generate",
        ),
        ("responses_from: rpo", "recipe.conflicting-fields", "train"),
        (MADE_BY_POLICIES.format("[]"), "recipe.empty-field", "generate.policies"),
        (MADE_BY_POLICIES.format("[rm]"), "recipe.wrong-stage-kind", "generate.policies.0"),
        (MADE_BY_POLICIES.format("[stf]"), "recipe.unknown-stage", "generate.policies.0"),
    ],
)
def test_what_is_refused(problems: Show, dpo: str, code: str, field: str) -> None:
    found = problems(chain(dpo))
    assert (code, f"chain.yaml:14 (stages.dpo.data.{field})") in {(p.code, p.where) for p in found}
    # The stage that samples has `train`, also next to `responses_from`.
    assert len(found) == 1 or "responses_from" in dpo


def test_rows_of_a_stage_that_samples_none(problems: Show) -> None:
    found = problems(chain("filter: {min_gap: 1}", "responses_from: dpo"))
    assert [(p.code, p.where) for p in found] == [
        ("recipe.wrong-stage-kind", "chain.yaml:19 (stages.rpo.data.responses_from)"),
        ("recipe.conflicting-fields", "chain.yaml:19 (stages.rpo.data.train)"),
    ]


@pytest.mark.parametrize("value", ["0", "-1.0", "automatic", "true", "[1]"])
def test_reward_scale_is_a_number_or_auto(problems: Show, value: str) -> None:
    text = chain().replace("    repeat: 3\n", f"    repeat: 3\n    reward_scale: {value}\n")
    (found,) = problems(text)
    assert found.code == "recipe.invalid-value" and "`reward_scale`" in found.what


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
