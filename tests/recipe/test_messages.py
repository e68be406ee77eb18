from __future__ import annotations

from collections.abc import Callable

import pytest

from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.recipe import LoadedRecipe

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[RPOTrainerError]]


def _dpo(extra: str) -> tuple[str, str]:
    return "    beta: 0.1\n", f"    beta: 0.1\n    {extra}\n"


def _beta(value: str) -> tuple[str, str]:
    return "    beta: 0.1\n", f"    beta: {value}\n"


# replaced text, replacement, code, place, names and values in the message
BAD: dict[str, tuple[str, str, str, str, list[str]]] = {
    "typo": (*_dpo("bta: 3"), "recipe.unknown-key", "chain.yaml:18 (stages.dpo.bta)", ["`beta`?"]),
    "typo at the top": (
        "defaults:",
        "defualts:",
        "recipe.unknown-key",
        "chain.yaml:3 (defualts)",
        ["`defaults`?"],
    ),
    "typo of a default": (
        "learning_rate",
        "learning_rat",
        "recipe.unknown-key",
        ":4",
        ["`learning_rate`?"],
    ),
    "typo in a source": (
        "{path: pairs",
        "{pth: pairs",
        "recipe.unknown-key",
        ":18",
        ["`pth`", "`path`?"],
    ),
    "name of another tool": (*_dpo("lr: 3"), "recipe.unknown-key", ":18", ["`learning_rate`?"]),
    "stage field at the top": (
        "defaults:",
        "beta: 1\ndefaults:",
        "recipe.misplaced-key",
        "chain.yaml:3 (beta)",
        ["kind dpo"],
    ),
    "typo and wrong level": (
        "defaults:",
        "lerning_rate: 1\ndefaults:",
        "recipe.unknown-key",
        ":3",
        ["`learning_rate`?"],
    ),
    "field of another kind": (
        "  - name: sft\n",
        "  - name: sft\n    beta: 1\n",
        "recipe.misplaced-key",
        "(stages.sft.beta)",
        ["`sft`", "kind dpo"],
    ),
    "source field in data": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: pairs.jsonl}], path: x}",
        "recipe.misplaced-key",
        "stages.dpo.data.path",
        ["`data.train`"],
    ),
    "another trainer argument": (
        *_dpo("dataloader_num_workers: 2"),
        "recipe.unknown-key",
        ":18",
        ["under `training_args`"],
    ),
    "name as a default": (
        "defaults:\n",
        "defaults:\n  name: x\n",
        "recipe.misplaced-key",
        ":4",
        ["`name`"],
    ),
    "shuffle": (
        *_dpo("shuffle: no"),
        "recipe.unknown-key",
        ":18",
        ["`shuffle`", "under `training_args`"],
    ),
    "key twice": (
        *_dpo("beta: 0.2"),
        "recipe.repeated-key",
        "chain.yaml:18 (stages.dpo.beta)",
        ["line 17"],
    ),
    "quoted number": (*_beta("'0.1'"), "recipe.wrong-type", ":17", ["'0.1'", "quotes"]),
    "number with a comma": (*_beta("0,1"), "recipe.wrong-type", ":17", ["'0,1'"]),
    "null": (*_beta(""), "recipe.wrong-type", ":17", ["null"]),
    "bool for a number": (*_beta("true"), "recipe.wrong-type", ":17", ["true"]),
    "nan": (*_beta(".nan"), "recipe.not-finite", ":17", ["`beta`", "nan"]),
    "infinite": (*_beta(".inf"), "recipe.not-finite", ":17", ["`beta`", "inf"]),
    "overflow": (*_beta("1e999"), "recipe.not-finite", ":17", ["`beta`"]),
    "zero": (*_beta("0"), "recipe.out-of-range", ":17", ["`beta`", "0"]),
    "negative": (*_beta("-0.1"), "recipe.out-of-range", ":17", ["`beta`", "0", "-0.1"]),
    "missing": (
        "    beta: 0.1\n",
        "",
        "recipe.missing-field",
        "chain.yaml:15",
        ["`beta`", "`dpo`"],
    ),
    "underscores": (*_dpo("max_length: 2_048"), "recipe.wrong-type", ":18", ["write 2048"]),
    "float for int": (*_dpo("max_length: 1e3"), "recipe.wrong-type", ":18", ["write 1000"]),
    "yes": (*_dpo("step0_check: yes"), "recipe.wrong-type", ":18", ["write true"]),
    "number for text": (*_dpo("optim: 3"), "recipe.wrong-type", ":18", ["3"]),
    "no list": (
        "train: [{path: pairs.jsonl}]",
        "train: {path: pairs.jsonl}",
        "recipe.wrong-type",
        ":18",
        ["`train`"],
    ),
    "no mapping": (
        "{train: [{path: pairs.jsonl}]}",
        "pairs.jsonl",
        "recipe.wrong-type",
        ":18",
        ["`data`"],
    ),
    "trackers": (*_dpo("report_to: [1]"), "recipe.wrong-type", ":18", ["`report_to`"]),
    "no model": (
        "model:\n  name_or_path: base\n",
        "",
        "recipe.missing-field",
        "chain.yaml:1",
        ["`model`"],
    ),
    "two models": (
        "name_or_path: base",
        "name_or_path: base\n  from_config: {model_type: llama}\n  tokenizer: characters",
        "recipe.conflicting-fields",
        "chain.yaml:3 (model.from_config)",
        ["`name_or_path`", "`from_config`"],
    ),
    "config without tokenizer": (
        "name_or_path: base",
        "from_config: {model_type: llama}",
        "recipe.missing-companion",
        ":2",
        ["`from_config`", "`tokenizer`", "`characters`"],
    ),
    "config without type": (
        "name_or_path: base",
        "from_config: {hidden_size: 8}\n  tokenizer: characters",
        "recipe.missing-field",
        ":2",
        ["no `model_type`"],
    ),
    "path and task": (
        "{path: pairs",
        "{task: a, path: pairs",
        "recipe.conflicting-fields",
        ":18",
        ["`path`", "`task`"],
    ),
    "neither path nor task": (
        "{path: code.jsonl}",
        "{split: train}",
        "recipe.missing-field",
        ":9",
        ["`path`", "`task`"],
    ),
    "size of a file": (
        "{path: code",
        "{size: 3, path: code",
        "recipe.unused-field",
        ":9",
        ["`task`", "`max_rows`"],
    ),
    "some weights": (
        "[{path: code.jsonl}]",
        "[{path: a, weight: 1}, {path: b}]",
        "recipe.missing-weight",
        "train.1",
        ["no `weight`"],
    ),
    "duplicate name": (
        "name: sft",
        "name: code-sft",
        "recipe.duplicate-stage",
        ":10",
        ["`code-sft`"],
    ),
    "name of a repeated": (
        "name: sft",
        "name: rpo-2",
        "recipe.duplicate-stage",
        "stages.rpo.name",
        ["`rpo-2`"],
    ),
    "reserved name": (
        "name: dpo",
        "name: model",
        "recipe.reserved-name",
        "stages.model.name",
        ["`model`"],
    ),
    "name with a slash": ("name: dpo", "name: a/b", "recipe.invalid-name", ":15", ["a/b"]),
    "later stage": (*_dpo("init: rpo"), "recipe.later-stage", "stages.dpo.init", ["`rpo`"]),
    "itself": (*_dpo("reference: dpo"), "recipe.later-stage", "stages.dpo.reference", ["`dpo`"]),
    "unknown stage": (*_dpo("init: stf"), "recipe.unknown-stage", ":18", ["`sft`?"]),
    "replay of a later": ("stage: code-sft", "stage: dpo", "recipe.later-stage", ":14", ["`dpo`"]),
    "replay in dpo": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: p}], replay: {stage: sft, fraction: 0.1}}",
        "recipe.unused-field",
        ":18",
        ["`data.replay`"],
    ),
    "overlap without eval": (
        "{train: [{path: code.jsonl}]}",
        "{train: [{path: p}], eval_overlap: error}",
        "recipe.missing-companion",
        ":9",
        ["`eval`"],
    ),
    "filter in sft": (
        "{train: [{path: code.jsonl}]}",
        "{train: [{path: p}], filter: {min_gap: 1}}",
        "recipe.unused-field",
        ":9",
        ["`data.filter`", "bradley_terry"],
    ),
    "generate without score": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: p}], generate: {max_new_tokens: 9}}",
        "recipe.missing-companion",
        ":18",
        ["`generate`", "`score`"],
    ),
    "one response": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: p}], generate: {max_new_tokens: 9, responses: 1}, "
        "score: {verifier: exact}}",
        "recipe.too-few-responses",
        ":18",
        [],
    ),
    "many responses in dpo": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: p}], pairs: {select: all_responses}}",
        "recipe.too-many-responses",
        ":18",
        ["`select: all_responses`", "`dpo`"],
    ),
    "score without generate": (
        "defaults:",
        "eval: {data: [{path: p}], score: {verifier: exact}}\ndefaults:",
        "recipe.missing-companion",
        ":3",
        ["`score`", "`generate`"],
    ),
    "unknown loss": (
        *_dpo("loss_type: dpoo"),
        "recipe.invalid-choice",
        ":18",
        ["`dpo`", "`ipo`", "mean `dpo`?"],
    ),
    "loss of TRL": (*_dpo("loss_type: sigmoid"), "recipe.invalid-choice", ":18", ["write `dpo`"]),
    "loss of rpo": (*_dpo("loss_type: rpo_sq"), "recipe.invalid-choice", ":18", ["kind rpo"]),
    "smoothed ipo": (
        *_dpo("loss_type: ipo\n    label_smoothing: 0.1"),
        "recipe.unused-field",
        ":19",
        ["`label_smoothing`", "`loss_type: ipo`"],
    ),
    "smoothing too large": (*_dpo("label_smoothing: 0.5"), "recipe.out-of-range", ":18", ["0.5"]),
    "unknown kind": (
        "kind: dpo",
        "kind: dpoo",
        "recipe.invalid-choice",
        ":15",
        ["`dpoo`", "`dpo`"],
    ),
    "no kind": ("    kind: dpo\n", "", "recipe.missing-field", ":15", ["`kind`", "`dpo`"]),
    "rpo_alpha": (*_dpo("rpo_alpha: 1"), "recipe.unknown-key", ":18", ["`sft_loss_weight`"]),
    "rpo_alpha in training_args": (
        *_dpo("training_args: {rpo_alpha: 1}"),
        "recipe.unknown-key",
        ":18",
        ["`rpo_alpha`"],
    ),
    "epochs and steps": (
        *_dpo("num_train_epochs: 1\n    max_steps: 5"),
        "recipe.conflicting-fields",
        "chain.yaml:19 (stages.dpo.max_steps)",
        ["`max_steps`"],
    ),
    "bf16 and fp16": (
        *_dpo("training_args: {bf16: true, fp16: true}"),
        "recipe.conflicting-fields",
        ":18",
        ["`fp16`"],
    ),
    "own field as argument": (
        *_dpo("training_args: {learning_rate: 1}"),
        "recipe.misplaced-key",
        ":18",
        ["`learning_rate`"],
    ),
    "own field under another name": (
        *_dpo("training_args: {per_device_train_batch_size: 1}"),
        "recipe.misplaced-key",
        ":18",
        ["`micro_batch_size`"],
    ),
    "batches": (*_dpo("micro_batch_size: 3"), "recipe.batch-not-divisible", ":5", ["6", "9"]),
    "warm-up too long": (
        *_dpo("max_steps: 5\n    warmup_steps: 6\n    lr_scheduler_type: linear"),
        "recipe.warmup-too-long",
        ":19",
        ["5"],
    ),
    "warm-up ignored": (
        *_dpo("warmup_steps: 6"),
        "recipe.unused-field",
        ":18",
        ["constant_with_warmup"],
    ),
    "token": (
        *_dpo("training_args: {hub_token: abc}"),
        "recipe.secret",
        ":18",
        ["HF_TOKEN", "`hub_token`"],
    ),
    "password": ("defaults:", "password: abc\ndefaults:", "recipe.secret", ":3", ["`password`"]),
}


@pytest.mark.parametrize("case", BAD)
def test_one_mistake_gives_one_error_with_its_code_and_place(
    case: str, problems: Show, valid: str
) -> None:
    old, new, code, where, words = BAD[case]
    assert old in valid
    found = problems(valid.replace(old, new, 1))
    assert [problem.code for problem in found] == [code], found
    assert where in f"{found[0].where}:", found
    assert [word for word in words if word not in str(found[0])] == [], found


def test_stages_must_be_there(problems: Show) -> None:
    for stages, code in (
        ("", "recipe.missing-field"),
        ("stages: []\n", "recipe.empty-field"),
        ("stages:\n", "recipe.wrong-type"),
    ):
        (found,) = problems(f"model: {{name_or_path: x}}\n{stages}")
        assert found.code == code and "`stages`" in found.what


def test_with_a_token_budget_the_global_batch_is_any_number(load: Load, valid: str) -> None:
    old, new = _dpo("micro_batch_size: 3\n    micro_batch_tokens: 4096")
    stage = load(valid.replace(old, new, 1)).recipe.stages[2]
    assert (stage.global_batch_size, stage.micro_batch_tokens) == (8, 4096)


def test_a_bad_default_is_reported_once_at_its_own_line(problems: Show, valid: str) -> None:
    (found,) = problems(valid.replace("defaults:\n", "defaults:\n  max_grad_norm: -1\n"))
    assert found.where == "chain.yaml:4 (defaults.max_grad_norm)"


def test_a_default_that_no_stage_uses_is_checked_too(problems: Show, valid: str) -> None:
    text = valid[: valid.index("  - name: rpo")]
    (found,) = problems(text.replace("defaults:\n", "defaults:\n  reward_scale: 0\n"))
    assert found.where == "chain.yaml:4 (defaults.reward_scale)"


def test_a_secret_is_not_shown_and_the_environment_is_a_place_for_it(
    problems: Show, load: Load, valid: str
) -> None:
    old, new = _dpo("training_args: {hub_token: hush-hush}")
    for found in (
        problems(valid.replace(old, new, 1)),
        problems(valid, ["stages.dpo.training_args.hub_token=hush-hush"]),
    ):
        assert [problem.code for problem in found] == ["recipe.secret"]
        assert "hush-hush" not in str(found[0])
    old, new = _dpo("training_args: {hub_token: '${HF_TOKEN}'}")
    assert load(valid.replace(old, new, 1)).recipe.stages[2].training_args == {
        "hub_token": "${HF_TOKEN}"
    }


def test_many_responses_for_rpo(problems: Show, load: Load, valid: str) -> None:
    data = "{train: [{path: p}], generate: {max_new_tokens: 9}, score: {verifier: exact}, "
    data += "pairs: {select: all_responses}}"
    head, tail = valid[: valid.rindex("{train")], "\n    loss_type: "
    assert load(f"{head}{data}{tail}rpo_sqloo\n")
    (found,) = problems(f"{head}{data}{tail}rpo_sq\n")
    assert found.code == "recipe.too-many-responses" and "`rpo_sq`" in found.what


def test_an_error_in_pydantics_own_words_has_all_its_parts_too(problems: Show, valid: str) -> None:
    (found,) = problems(valid.replace("name_or_path: base", 'name_or_path: "\\ud800"'))
    assert found.code == "recipe.invalid-value"
    assert found.where == "chain.yaml:2 (model.name_or_path)" and "`name_or_path`" in found.what
