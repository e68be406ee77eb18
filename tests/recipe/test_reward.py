"""Reward stages in a recipe: their place in the chain, and what they may say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rpo_trainer.recipe import LoadedRecipe, RewardStage, expand_stages

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[str]]

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


# the line replaced, by, where, words of the message
PAIRS = "    data: {train: [{path: pairs.jsonl}], eval_fraction: 0.1}\n"
RATED = "    attributes: [helpfulness]\n"
BAD: dict[str, tuple[str, str, str, str]] = {
    "a policy from a reward model": (
        "    repeat: 2\n",
        "    init: rm\n",
        ":20",
        "`init` refers to `rm`, a reward stage",
    ),
    "a reward model as reference": (
        "    repeat: 2\n",
        "    reference: rm-more\n",
        ":20",
        "`reference` refers to `rm-more`, a reward stage",
    ),
    "responses from a reward model": (
        "    objective: regression\n    init: rm\n    attributes: [helpfulness]\n"
        "    data: {train: [{path: ratings.jsonl}]}\n",
        "    objective: bradley_terry\n    init: rm\n"
        "    data: {train: [{path: p}], generate: {max_new_tokens: 9}, score: {verifier: exact}}\n",
        ":14",
        "`init` refers to `rm`, a reward stage",
    ),
    "no attributes": (RATED, "", ":11", "`objective: regression` without `attributes`"),
    "an attribute twice": (RATED, "    attributes: [a, a]\n", ":15", "an attribute is named twice"),
    "margin of ratings": (
        RATED,
        RATED + "    margin_scale: 1.0\n",
        ":16",
        "`margin_scale` has no meaning for `objective: regression`",
    ),
    "attributes of pairs": (
        PAIRS,
        RATED + PAIRS,
        ":10",
        "`attributes` has no meaning for `objective: bradley_terry`",
    ),
    "range upside down": (
        RATED,
        RATED + "    rating_range: [4, 0]\n",
        ":16",
        "`rating_range` goes from 4 to 0",
    ),
    "range of three": (RATED, RATED + "    rating_range: [0, 2, 4]\n", ":16", "at most 2"),
    "no such weights": (
        RATED,
        RATED + "    reward_weights: nemotron\n",
        ":16",
        "there are no published weights 'nemotron'",
    ),
    "weights of other attributes": (
        RATED,
        RATED + "    reward_weights: {depth: 1.0}\n",
        ":16",
        "no weight for helpfulness; a weight for depth",
    ),
    "published weights of other attributes": (
        RATED,
        RATED + "    reward_weights: llama3-70b-steerlm-rm\n",
        ":16",
        "a weight for correctness",
    ),
    "policy evaluation": (
        PAIRS,
        PAIRS + "    eval: {data: [{path: p}]}\n",
        ":11",
        "`eval` in a reward stage",
    ),
    "an adapter": (PAIRS, PAIRS + "    peft: {r: 4}\n", ":11", "a reward stage trains all weights"),
    "rounds": (PAIRS, PAIRS + "    repeat: 2\n", ":11", "`repeat` of a reward stage"),
    "two kinds of held-out rows": (
        "eval_fraction: 0.1}",
        "eval: [{path: p}], eval_fraction: 0.1}",
        ":10",
        "`data` has both `eval` and `eval_fraction`",
    ),
    "a share of 1": ("eval_fraction: 0.1}", "eval_fraction: 1.0}", ":10", "less than 1"),
    "filter of ratings": (
        "ratings.jsonl}]}",
        "ratings.jsonl}], filter: {min_gap: 1}}",
        ":16",
        "`data.filter` is for stages of kind dpo, rpo or reward (bradley_terry)",
    ),
    "held-out share of sft": (
        "sft.jsonl}]}",
        "sft.jsonl}], eval_fraction: 0.1}",
        ":6",
        "`data.eval_fraction` is for stages of kind reward",
    ),
    "replay": (
        "ratings.jsonl}]}",
        "ratings.jsonl}], replay: {stage: sft, fraction: 0.1}}",
        ":16",
        "`data.replay` is for stages of kind sft",
    ),
    "more than two responses": (
        "eval_fraction: 0.1}",
        "generate: {max_new_tokens: 9}, score: {verifier: exact}, pairs: {select: all_responses}}",
        ":10",
        "`select: all_responses` with the loss `bradley_terry`",
    ),
    "no objective": ("    objective: bradley_terry\n", "", ":7", "`objective`"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_error_with_where_what_and_fix(name: str, problems: Show) -> None:
    old, new, where, message = BAD[name]
    assert CHAIN.count(old) == 1
    found = problems(CHAIN.replace(old, new))
    assert len(found) == 1, found
    assert f"chain.yaml{where}" in found[0].splitlines()[0]
    assert message in found[0] and "fix:" in found[0]


def test_an_adapter_may_go_on_behind_a_reward_stage(load: Load) -> None:
    peft = "    peft: {r: 4, between_stages: keep}\n"
    text = CHAIN.replace(
        "    data: {train: [{path: sft.jsonl}]}\n", peft + "    data: {train: [{path: s}]}\n"
    )
    assert load(text.replace("    repeat: 2\n", peft)).recipe.stages[-1].peft is not None
