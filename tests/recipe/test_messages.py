from __future__ import annotations

from collections.abc import Callable

import pytest

from rpo_trainer.recipe import LoadedRecipe

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[str]]


def _dpo(extra: str) -> tuple[str, str]:
    return "    beta: 0.1\n", f"    beta: 0.1\n    {extra}\n"


def _beta(value: str) -> tuple[str, str]:
    return "    beta: 0.1\n", f"    beta: {value}\n"


# replaced, by, where, words of the message
BAD: dict[str, tuple[str, str, str, list[str]]] = {
    "typo": (*_dpo("bta: 3"), "chain.yaml:18 (stages.dpo.bta)", ["unknown key", "`beta`?"]),
    "typo at the top": ("defaults:", "defualts:", "chain.yaml:3 (defualts)", ["`defaults`?"]),
    "typo of a default": ("learning_rate", "learning_rat", ":4", ["`learning_rate`?"]),
    "typo in a source": ("{path: pairs", "{pth: pairs", ":18", ["unknown key `pth`", "`path`?"]),
    "name of another tool": (*_dpo("lr: 3"), ":18", ["did you mean `learning_rate`?"]),
    "stage field at the top": (
        "defaults:",
        "beta: 1\ndefaults:",
        "chain.yaml:3 (beta)",
        ["does not belong in the recipe", "a stage of kind dpo or rpo"],
    ),
    "typo and wrong level": (
        "defaults:",
        "lerning_rate: 1\ndefaults:",
        ":3",
        ["did you mean `learning_rate`?", "belongs in a stage"],
    ),
    "field of another kind": (
        "  - name: sft\n",
        "  - name: sft\n    beta: 1\n",
        "(stages.sft.beta)",
        ["does not belong in stage `sft`", "kind dpo or rpo"],
    ),
    "source field in data": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: pairs.jsonl}], path: x}",
        "stages.dpo.data.path",
        ["belongs in `data.train` of a stage"],
    ),
    "another trainer argument": (
        *_dpo("dataloader_num_workers: 2"),
        ":18",
        ["unknown key", "under `training_args`"],
    ),
    "name as a default": ("defaults:\n", "defaults:\n  name: x\n", ":4", ["cannot be a default"]),
    "shuffle": (*_dpo("shuffle: no"), ":18", ["unknown key `shuffle`", "under `training_args`"]),
    "key twice": (*_dpo("beta: 0.2"), "chain.yaml:18 (stages.dpo.beta)", ["twice", "line 17"]),
    "quoted number": (*_beta("'0.1'"), ":17", ["must be a number, got the text '0.1'", "quotes"]),
    "number with a comma": (*_beta("0,1"), ":17", ["must be a number, got the text '0,1'"]),
    "null": (*_beta(""), ":17", ["must be a number, got nothing (null)"]),
    "bool for a number": (*_beta("true"), ":17", ["must be a number, got true"]),
    "nan": (*_beta(".nan"), ":17", ["`beta` must be a finite number, got nan"]),
    "infinite": (*_beta(".inf"), ":17", ["`beta` must be a finite number, got inf"]),
    "overflow": (*_beta("1e999"), ":17", ["`beta` must be a finite number"]),
    "zero": (*_beta("0"), ":17", ["`beta` must be greater than 0, got 0"]),
    "negative": (*_beta("-0.1"), ":17", ["`beta` must be greater than 0, got -0.1"]),
    "missing": ("    beta: 0.1\n", "", "chain.yaml:15", ["`beta` is missing in stage `dpo`"]),
    "underscores": (*_dpo("max_length: 2_048"), ":18", ["whole number", "write 2048"]),
    "float for int": (*_dpo("max_length: 1e3"), ":18", ["whole number", "write 1000"]),
    "yes": (*_dpo("step0_check: yes"), ":18", ["true or false", "write true"]),
    "number for text": (*_dpo("optim: 3"), ":18", ["must be text, got the number 3", "quotes"]),
    "no list": (
        "train: [{path: pairs.jsonl}]",
        "train: {path: pairs.jsonl}",
        ":18",
        ["must be a list", "list of one"],
    ),
    "no mapping": ("{train: [{path: pairs.jsonl}]}", "pairs.jsonl", ":18", ["a mapping"]),
    "trackers": (*_dpo("report_to: [1]"), ":18", ["`report_to` must be a name or a list"]),
    "no model": ("model:\n  name_or_path: base\n", "", "chain.yaml:1", ["`model` is missing"]),
    "two models": (
        "name_or_path: base",
        "name_or_path: base\n  from_config: {model_type: llama}\n  tokenizer: characters",
        "chain.yaml:3 (model.from_config)",
        ["both `name_or_path` and `from_config`"],
    ),
    "config without tokenizer": (
        "name_or_path: base",
        "from_config: {model_type: llama}",
        ":2",
        ["`from_config` without `tokenizer`", "`characters`"],
    ),
    "config without type": (
        "name_or_path: base",
        "from_config: {hidden_size: 8}\n  tokenizer: characters",
        ":2",
        ["no `model_type`"],
    ),
    "path and task": ("{path: pairs", "{task: a, path: pairs", ":18", ["both `path` and `task`"]),
    "neither path nor task": ("{path: code.jsonl}", "{split: train}", ":9", ["`path` or `task`"]),
    "size of a file": ("{path: code", "{size: 3, path: code", ":9", ["`task`", "`max_rows`"]),
    "some weights": (
        "[{path: code.jsonl}]",
        "[{path: a, weight: 1}, {path: b}]",
        "train.1",
        ["no `weight`"],
    ),
    "duplicate name": ("name: sft", "name: code-sft", ":10", ["two stages have the name"]),
    "name of a repeated": ("name: sft", "name: rpo-2", "stages.rpo.name", ["the name `rpo-2`"]),
    "reserved name": ("name: dpo", "name: model", "stages.model.name", ["another meaning"]),
    "name with a slash": ("name: dpo", "name: a/b", ":15", ["letter or a digit", "a/b"]),
    "later stage": (*_dpo("init: rpo"), "stages.dpo.init", ["`rpo`, which is not earlier"]),
    "itself": (*_dpo("reference: dpo"), "stages.dpo.reference", ["which is not earlier"]),
    "unknown stage": (*_dpo("init: stf"), ":18", ["not a stage; did you mean `sft`?", "slash"]),
    "replay of a later": ("stage: code-sft", "stage: dpo", ":14", ["which is not earlier"]),
    "replay in dpo": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: p}], replay: {stage: sft, fraction: 0.1}}",
        ":18",
        ["`data.replay` is for stages of kind sft"],
    ),
    "held out without eval": (
        "{train: [{path: code.jsonl}]}",
        "{train: [{path: p}], held_out: true}",
        ":9",
        ["`held_out` without `eval`", "fix: add `eval`, or remove `held_out`"],
    ),
    "filter in sft": (
        "{train: [{path: code.jsonl}]}",
        "{train: [{path: p}], filter: {min_gap: 1}}",
        ":9",
        ["`data.filter` is for stages of kind dpo, rpo or reward"],
    ),
    "generate without score": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: p}], generate: {max_new_tokens: 9}}",
        ":18",
        ["`generate` without `score`"],
    ),
    "one response": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: p}], generate: {max_new_tokens: 9, responses: 1}, "
        "score: {verifier: exact}}",
        ":18",
        ["one response for each prompt"],
    ),
    "many responses in dpo": (
        "{train: [{path: pairs.jsonl}]}",
        "{train: [{path: p}], pairs: {select: all_responses}}",
        ":18",
        ["`select: all_responses` with the loss `dpo`"],
    ),
    "score without generate": (
        "defaults:",
        "eval: {data: [{path: p}], score: {verifier: exact}}\ndefaults:",
        ":3",
        ["`score` without `generate`"],
    ),
    "unknown loss": (*_dpo("loss_type: dpoo"), ":18", ["one of `dpo`, `ipo`", "mean `dpo`?"]),
    "loss of TRL": (*_dpo("loss_type: sigmoid"), ":18", ["write `dpo`: the same loss"]),
    "loss of rpo": (*_dpo("loss_type: rpo_sq"), ":18", ["is a loss of stages of kind rpo"]),
    "smoothed ipo": (
        *_dpo("loss_type: ipo\n    label_smoothing: 0.1"),
        ":19",
        ["`label_smoothing` with `loss_type: ipo`"],
    ),
    "smoothing too large": (*_dpo("label_smoothing: 0.5"), ":18", ["less than 0.5, got 0.5"]),
    "unknown kind": ("kind: dpo", "kind: dpoo", ":15", ["unknown kind `dpoo`; did you mean `dpo`"]),
    "no kind": ("    kind: dpo\n", "", ":15", ["`kind` is missing in stage `dpo`"]),
    "rpo_alpha": (*_dpo("rpo_alpha: 1"), ":18", ["no reward gap", "`sft_loss_weight`"]),
    "rpo_alpha in training_args": (
        *_dpo("training_args: {rpo_alpha: 1}"),
        ":18",
        ["`rpo_alpha` is not a field here"],
    ),
    "epochs and steps": (
        *_dpo("num_train_epochs: 1\n    max_steps: 5"),
        "chain.yaml:19 (stages.dpo.max_steps)",
        ["both given"],
    ),
    "bf16 and fp16": (*_dpo("training_args: {bf16: true, fp16: true}"), ":18", ["both on"]),
    "own field as argument": (
        *_dpo("training_args: {learning_rate: 1}"),
        ":18",
        ["does not belong in `training_args`"],
    ),
    "own field under another name": (
        *_dpo("training_args: {per_device_train_batch_size: 1}"),
        ":18",
        ["use `micro_batch_size` instead"],
    ),
    "batches": (*_dpo("micro_batch_size: 3"), ":5", ["not a multiple", "6 or 9"]),
    "warm-up too long": (
        *_dpo("max_steps: 5\n    warmup_steps: 6\n    lr_scheduler_type: linear"),
        ":19",
        ["longer than the stage", "at most 5"],
    ),
    "warm-up ignored": (*_dpo("warmup_steps: 6"), ":18", ["constant_with_warmup"]),
    "token": (*_dpo("training_args: {hub_token: abc}"), ":18", ["a secret", "HF_TOKEN"]),
    "password": ("defaults:", "password: abc\ndefaults:", ":3", ["looks like a secret"]),
}


@pytest.mark.parametrize("case", BAD)
def test_one_mistake_gives_one_error_with_where_what_and_fix(
    case: str, problems: Show, valid: str
) -> None:
    old, new, where, words = BAD[case]
    assert old in valid
    shown = problems(valid.replace(old, new, 1))
    assert len(shown) == 1, "\n".join(shown)
    assert where in shown[0].split(": ", 1)[0] + ":", shown[0]
    for word in words:
        assert word in shown[0], shown[0]
    assert "\n  why: " in shown[0] and "\n  fix: " in shown[0]


def test_stages_must_be_there(problems: Show) -> None:
    assert "`stages` is missing" in problems("model: {name_or_path: x}\n")[0]
    assert "`stages` is empty" in problems("model: {name_or_path: x}\nstages: []\n")[0]
    assert "must be a list" in problems("model: {name_or_path: x}\nstages:\n")[0]


def test_with_a_token_budget_the_global_batch_is_any_number(load: Load, valid: str) -> None:
    old, new = _dpo("micro_batch_size: 3\n    micro_batch_tokens: 4096")
    stage = load(valid.replace(old, new, 1)).recipe.stages[2]
    assert (stage.global_batch_size, stage.micro_batch_tokens) == (8, 4096)


def test_a_bad_default_is_reported_once_at_its_own_line(problems: Show, valid: str) -> None:
    shown = problems(valid.replace("defaults:\n", "defaults:\n  max_grad_norm: -1\n"))
    assert len(shown) == 1
    assert shown[0].startswith("chain.yaml:4 (defaults.max_grad_norm): ")


def test_a_default_that_no_stage_uses_is_checked_too(problems: Show, valid: str) -> None:
    text = valid[: valid.index("  - name: rpo")]
    shown = problems(text.replace("defaults:\n", "defaults:\n  reward_scale: 0\n"))
    assert [line.split(":")[1] for line in shown] == ["4 (defaults.reward_scale)"]


def test_a_secret_is_not_shown_and_the_environment_is_a_place_for_it(
    problems: Show, load: Load, valid: str
) -> None:
    old, new = _dpo("training_args: {hub_token: hush-hush}")
    assert "hush-hush" not in problems(valid.replace(old, new, 1))[0]
    assert "hush-hush" not in problems(valid, ["stages.dpo.training_args.hub_token=hush-hush"])[0]
    old, new = _dpo("training_args: {hub_token: '${HF_TOKEN}'}")
    assert load(valid.replace(old, new, 1)).recipe.stages[2].training_args == {
        "hub_token": "${HF_TOKEN}"
    }


def test_many_responses_for_rpo(problems: Show, load: Load, valid: str) -> None:
    data = "{train: [{path: p}], generate: {max_new_tokens: 9}, score: {verifier: exact}, "
    data += "pairs: {select: all_responses}}"
    head, tail = valid[: valid.rindex("{train")], "\n    loss_type: "
    assert load(f"{head}{data}{tail}rpo_sqloo\n")
    assert (
        "`select: all_responses` with the loss `rpo_sq`"
        in problems(f"{head}{data}{tail}rpo_sq\n")[0]
    )


def test_an_error_in_pydantics_own_words_says_why_too(problems: Show, valid: str) -> None:
    (shown,) = problems(valid.replace("name_or_path: base", 'name_or_path: "\\ud800"'))
    assert "chain.yaml:2 (model.name_or_path): `name_or_path`: " in shown
    assert "\n  why: what is written is taken as it is, and never converted" in shown
