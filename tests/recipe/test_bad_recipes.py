"""What each bad recipe must get: an error that says where, what, why and what to do; nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.cli.commands import main
from rpo_trainer.recipe import DPOStage, load_recipe

Capture = pytest.CaptureFixture[str]


def changed(valid: str, old: str, new: str) -> str:
    assert old in valid
    return valid.replace(old, new, 1)


class Tried:
    """A recipe given to the command line, in an empty directory."""

    def __init__(self, folder: Path, capture: Capture) -> None:
        self.folder, self.capture = folder, capture
        self.path = folder / "chain.yaml"

    def refused(
        self, text: str | bytes, *overrides: str, command: str = "run", code: int = 2
    ) -> str:
        """What is shown, the directory cut off; each of the errors has all its parts."""
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.refused_as_it_is(*overrides, command=command, code=code)

    def refused_as_it_is(self, *overrides: str, command: str = "run", code: int = 2) -> str:
        before = sorted(self.folder.rglob("*"))
        with pytest.raises(SystemExit) as end:
            main([command, str(self.path), *overrides, "--run-dir", str(self.folder / "run")])
        shown = self.capture.readouterr().err
        assert end.value.code == code, shown
        assert sorted(self.folder.rglob("*")) == before
        assert "Traceback" not in shown
        errors = shown.removeprefix("error: ").replace(f"{self.folder}/", "")
        *problems, _ = re.split(r"\n(?! )", errors.rstrip("\n"))
        for problem in problems:
            assert re.fullmatch(r"\S.*: .+\n  why: .+\n  fix: .+", problem), problem
        return errors


@pytest.fixture
def tried(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Tried:
    monkeypatch.chdir(tmp_path)
    return Tried(tmp_path, capsys)


IGNORED = "nothing reads it there: it would be ignored in silence"
CONVERTED = "what is written is taken as it is, and never converted"
RANGE = "outside of its range it means nothing, or fails in the middle of a run"
GUESSED = "which of the two is meant cannot be guessed"
BETA = "β, the strength of the tie to the reference, for example 0.01"
DPO = "    beta: 0.1\n"

# case: what is replaced, by what, and the whole message: where, what, why, fix
CASES: dict[str, tuple[str, str, str, str, str, str]] = {
    "key typo": (
        DPO, f"{DPO}    bta: 3\n", "18 (stages.dpo.bta)",
        "unknown key `bta` in stage `dpo`; did you mean `beta`?", IGNORED, f"write `beta`: {BETA}",
    ),
    "key at the wrong level": (
        "defaults:", "beta: 1\ndefaults:", "3 (beta)", "`beta` does not belong in the recipe",
        IGNORED, "it belongs in a stage of kind dpo or rpo",
    ),
    "key given twice": (
        DPO, f"{DPO}    beta: 0.2\n", "18 (stages.dpo.beta)",
        "the key `beta` is given twice, first on line 17", GUESSED, "keep one of the two",
    ),
    "wrong type": (
        "[{path: pairs.jsonl}]", "pairs.jsonl", "18 (stages.dpo.data.train)",
        "`train` must be a list (lines that begin with `- `), got the text 'pairs.jsonl'",
        CONVERTED, "put `- ` in front of it: a list of one is a list too",
    ),
    "a number in quotes": (
        DPO, "    beta: '0.1'\n", "17 (stages.dpo.beta)",
        "`beta` must be a number, got the text '0.1'", CONVERTED, "remove the quotes",
    ),
    "β that is NaN": (
        DPO, "    beta: .nan\n", "17 (stages.dpo.beta)", "`beta` must be a finite number, got nan",
        "all that is computed with it would be NaN or infinite", f"write a finite number ({BETA})",
    ),
    "β that is infinite": (
        DPO, "    beta: .inf\n", "17 (stages.dpo.beta)", "`beta` must be a finite number, got inf",
        "all that is computed with it would be NaN or infinite", f"write a finite number ({BETA})",
    ),
    "β that is 0": (
        DPO, "    beta: 0\n", "17 (stages.dpo.beta)", "`beta` must be greater than 0, got 0",
        RANGE, f"write a number greater than 0 ({BETA})",
    ),
    "β that is negative": (
        DPO, "    beta: -0.1\n", "17 (stages.dpo.beta)", "`beta` must be greater than 0, got -0.1",
        RANGE, f"write a number greater than 0 ({BETA})",
    ),
    "shuffle: no": (
        DPO, f"{DPO}    shuffle: no\n", "18 (stages.dpo.shuffle)",
        "unknown key `shuffle` in stage `dpo`", IGNORED,
        "write it under `training_args`; without it each epoch is a new permutation",
    ),
    "two documents": (
        "defaults:", "---\ndefaults:", "3", "a second document begins here",
        "one file is one chain; which of the two is meant cannot be guessed",
        "keep one document: remove the `---` and what does not belong",
    ),
    "tabs": (
        "  name_or_path", "\tname_or_path", "2", "a tab in the indentation",
        "YAML allows none: how deep a tab is depends on who reads it", "indent with spaces",
    ),
    "!!python/object": (
        "base", "!!python/object/apply:os.system [ls]", "2",
        "the tag `!!python/object/apply:os.system` is not allowed",
        "a recipe is one document of plain values, with no objects, code or references",
        "write a plain value; quotes make text of anything",
    ),
    "missing model": (
        "model:\n  name_or_path: base\n", "", "1", "`model` is missing in the recipe",
        "no value is right for every run",
        "add `model: ...` (the model that the first stage starts from)",
    ),
    "two stages of one name": (
        "name: sft\n", "name: code-sft\n", "10 (stages.code-sft.name)",
        "two stages have the name `code-sft`",
        "a stage is known by its name, and has a directory of that name",
        "give each stage a name of its own; `repeat` makes name-1, name-2, ...",
    ),
    "a stage that refers to a later one": (
        DPO, f"{DPO}    init: rpo\n", "18 (stages.dpo.init)",
        "`init` refers to `rpo`, which is not earlier in the chain",
        "a stage can only use what is there when it starts",
        "use one of `previous`, `model`, `code-sft`, `sft`, or a path with a slash (./name)",
    ),
    "unknown loss": (
        DPO, f"{DPO}    loss_type: dpoo\n", "18 (stages.dpo.loss_type)",
        "`loss_type` must be one of `dpo`, `ipo`, got the text 'dpoo'; did you mean `dpo`?",
        "each choice is another computation, and none is guessed", "write `dpo`",
    ),
    "rpo_alpha": (
        DPO, f"{DPO}    rpo_alpha: 1\n", "18 (stages.dpo.rpo_alpha)",
        "`rpo_alpha` is not a field here",
        "elsewhere it means DPO plus the NLL of the chosen, which has no reward gap and is not RPO",
        "use `sft_loss_weight` for the NLL term; `kind: rpo` for reward-aware optimisation",
    ),
    "epochs and max_steps both": (
        DPO, f"{DPO}    num_train_epochs: 1\n    max_steps: 5\n", "19 (stages.dpo.max_steps)",
        "`num_train_epochs` and `max_steps` are both given",
        "each of them says how long the stage is", "keep one of the two",
    ),
    "bf16 and fp16 both": (
        DPO, f"{DPO}    training_args: {{bf16: true, fp16: true}}\n",
        "18 (stages.dpo.training_args.fp16)", "`bf16` and `fp16` are both on",
        "the arithmetic is in one of them",
        "keep `bf16: true` where the hardware has it, else `fp16: true`",
    ),
    "fp16 beside the dtype of the model": (
        DPO, f"{DPO}    training_args: {{fp16: true}}\n", "18 (stages.dpo.training_args.fp16)",
        "`fp16` is on, and `model.dtype` is bfloat16", "the arithmetic is in one of them",
        "remove `fp16`, and write `dtype: float16` under `model` if that is meant",
    ),
    "global_batch_size that does not divide by the micro-batch": (
        DPO, f"{DPO}    micro_batch_size: 3\n", "5 (defaults.global_batch_size)",
        "`global_batch_size` 8 is not a multiple of `micro_batch_size` 3",
        "every forward pass of every process holds the same number of examples",
        "write 6 or 9, or another `micro_batch_size`",
    ),
    "warm-up longer than the run": (
        DPO, f"{DPO}    max_steps: 5\n    warmup_steps: 6\n    lr_scheduler_type: linear\n",
        "19 (stages.dpo.warmup_steps)",
        "`warmup_steps` is 6, longer than the stage, whose `max_steps` is 5",
        "the learning rate would never reach its peak", "write at most 5, or raise `max_steps`",
    ),
    "on_nonfinite that is neither": (
        DPO, f"{DPO}    on_nonfinite: skip(3)\n", "18 (stages.dpo.on_nonfinite)",
        "`on_nonfinite` must be one of `stop`, `skip`, got the text 'skip(3)'; did you mean `skip`?",
        "each choice is another computation, and none is guessed", "write `skip`",
    ),
    "skipped steps of a stage that stops": (
        DPO, f"{DPO}    max_skipped_steps: 3\n", "18 (stages.dpo.max_skipped_steps)",
        "`max_skipped_steps` with `on_nonfinite: stop`",
        "the stage stops at the first such step, so none is left out",
        "write `on_nonfinite: skip`, or remove it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_recipe(case: str, tried: Tried, valid: str) -> None:
    old, new, place, what, why, fix = CASES[case]
    shown = tried.refused(changed(valid, old, new))
    message = f"chain.yaml:{place}: {what}\n  why: {why}\n  fix: {fix}\n1 problem found\n"
    assert shown == message


@pytest.mark.parametrize("command", ["check", "plan", "dpo"])
def test_every_command_says_the_same(command: str, tried: Tried, valid: str) -> None:
    bad = changed(valid, DPO, "    beta: '0.1'\n")
    assert tried.refused(bad, command=command) == tried.refused(bad)


@pytest.mark.parametrize("path", ["with a space", "naïve-数据"])
def test_what_looks_odd_and_is_fine(path: str, tried: Tried, valid: str) -> None:
    """A byte-order mark, `1e-5`, `010` as ten, Windows line ends, spaces and Unicode in the path."""
    folder = tried.folder / path
    folder.mkdir()
    text = changed(valid, "beta: 0.1", "beta: 1e-5") + "seed: 010\n"
    (folder / "chain.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    recipe = load_recipe(folder / "chain.yaml").recipe
    assert recipe.seed == 10
    assert isinstance(recipe.stages[2], DPOStage) and recipe.stages[2].beta == 1e-5


# --- the whole file ---


@pytest.mark.parametrize("text", ["", "\n\n", "# later\n"])
def test_an_empty_file(text: str, tried: Tried) -> None:
    shown = tried.refused(text)
    assert shown.startswith("chain.yaml:1: the file is empty\n  why: there is nothing to run\n")
    assert "fix: write at least `model` and `stages`" in shown


def test_a_list_at_the_top(tried: Tried) -> None:
    shown = tried.refused("- model: base\n- stages: []\n")
    assert shown.startswith("chain.yaml:1: a recipe is a mapping; this file holds a list\n")
    assert "fix: begin with `model:` and `stages:` at the left edge" in shown


def test_no_stages(tried: Tried, valid: str) -> None:
    head = valid[: valid.index("stages:")]
    assert tried.refused(head).startswith("chain.yaml:1: `stages` is missing in the recipe\n")
    assert tried.refused(f"{head}stages: []\n").startswith(
        "chain.yaml:6 (stages): `stages` is empty\n"
    )


def test_an_anchor(tried: Tried, valid: str) -> None:
    """Refused where it stands, before the alias: `defaults` holds what stages share."""
    shown = tried.refused(valid + "a0: &a0 [1, 1]\na1: [*a0, *a0]\n")
    assert shown.startswith("chain.yaml:24: anchors and aliases are not allowed: `&a0`\n  why: ")
    assert "`defaults`" in shown.partition("  fix: ")[2]


def test_tags_run_no_code(tried: Tried, valid: str) -> None:
    tried.refused(changed(valid, "base", "!!python/object/apply:os.mkdir [run]"))
    tried.refused(changed(valid, "base", '!!python/object/new:os.system ["touch run"]'))


# --- the path ---


def test_a_path_that_is_a_directory(tried: Tried) -> None:
    tried.path.mkdir()
    (tried.path / "mine.yaml").write_text("")
    shown = tried.refused_as_it_is()
    assert shown.startswith("chain.yaml: this is a directory, not a recipe\n")
    assert "  fix: give a file in it: chain.yaml/mine.yaml\n" in shown


def test_a_path_that_is_absent(tried: Tried) -> None:
    (tried.folder / "chian.yaml").write_text("")
    shown = tried.refused_as_it_is()
    assert shown.startswith("chain.yaml: there is no such file; did you mean `chian.yaml`?\n")


def test_a_path_that_cannot_be_read(
    tried: Tried, valid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == tried.path and args == ("rb",):
            raise PermissionError(13, "Permission denied")
        return own(self, *args, **kwargs)

    tried.path.write_text(valid)
    monkeypatch.setattr(Path, "open", refuse)
    shown = tried.refused_as_it_is()
    assert shown.startswith("chain.yaml: the file cannot be read: Permission denied\n")


def test_a_path_whose_bytes_are_not_utf_8(tried: Tried, valid: str) -> None:
    shown = tried.refused(valid.encode().replace(b"base", b"caf\xe9"))
    assert shown.startswith("chain.yaml:2: byte 26 of the file is not UTF-8\n")
    assert "  fix: save the file as UTF-8\n" in shown


# --- overrides ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stages.dpo.bta=1"],
            "override stages.dpo.bta=1: unknown key `bta` in stage `dpo`; did you mean `beta`?\n",
        ),
        (["stages.dpo.beta"], "override stages.dpo.beta: there is no `=`\n"),
        (["stages.dpo.beta="], "override stages.dpo.beta=: there is no value\n"),
        (["--stages.dpo.beta"], "override --stages.dpo.beta: there is no value\n"),
        (
            ["stages.dop.beta=1"],
            "override stages.dop.beta=1: there is no stage `dop`; did you mean `dpo`?\n",
        ),
    ],
    ids=["of an unknown key", "without =", "without value", "--key without value", "of no stage"],
)
def test_an_override(words: list[str], message: str, tried: Tried, valid: str) -> None:
    assert tried.refused(valid, *words).startswith(message)


# --- secrets ---

TOKEN = "hf_" + "abcdefghij" * 3


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        (DPO, f"{DPO}    training_args: {{hub_token: hush}}\n", "18 (stages.dpo.training_args.hub_token)"),
        ("defaults:", "password: hush\ndefaults:", "3 (password)"),
        (DPO, f"{DPO}    training_args: {{run_name: {TOKEN}}}\n", "18 (stages.dpo.training_args.run_name)"),
        (DPO, f"{DPO}    report_to: [wandb, {TOKEN}]\n", "18 (stages.dpo.report_to.1)"),
        ("code.jsonl", "https://me:hush@host/code.jsonl", "9 (stages.code-sft.data.train.0.path)"),
    ],
    ids=["a token", "a password", "a token under another name", "a token in a list", "in an address"],
)  # fmt: skip
def test_a_secret_in_the_recipe(old: str, new: str, place: str, tried: Tried, valid: str) -> None:
    shown = tried.refused(changed(valid, old, new))
    assert shown.startswith(f"chain.yaml:{place}: ")
    assert "holds what looks like a secret\n  why: the recipe is copied into every run" in shown
    assert "hush" not in shown and TOKEN not in shown
    assert shown.endswith("1 problem found\n")


@pytest.mark.parametrize("value", ["hush", "@hush"])
def test_a_secret_in_an_override(value: str, tried: Tried, valid: str) -> None:
    shown = tried.refused(valid, f"stages.dpo.training_args.hub_token={value}")
    assert shown.startswith("override stages.dpo.training_args.hub_token=...: ")
    assert "hush" not in shown


# --- what only the data and the processes tell ---

ON_DATA = """\
model:
  from_config: {model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
    num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 64}
  tokenizer: characters
  dtype: float32
stages:
  - name: rpo
    kind: rpo
    beta: 0.1
    data: {train: [{path: pairs.jsonl}]}
    max_length: 64
    global_batch_size: 2
    learning_rate: 1e-5
"""


def pairs(folder: Path, rewards: bool = True) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(6)]
    scores = {"chosen_reward": 2.0, "rejected_reward": 1.0} if rewards else {}
    (folder / "pairs.jsonl").write_text("".join(json.dumps({**r, **scores}) + "\n" for r in rows))


@pytest.mark.parametrize("command", ["check", "run"])
def test_rpo_on_data_without_rewards(command: str, tried: Tried) -> None:
    pairs(tried.folder, rewards=False)
    shown = tried.refused(ON_DATA, command=command, code=3)
    assert shown == (
        "chain.yaml:10 (stages.rpo.data): pairs.jsonl: no row has rewards, and RPO needs one for every "
        "response\n"
        "  why: the gap between the rewards is what RPO learns, and no reward is made up\n"
        "  fix: score the responses (`score:` in the recipe, or rpo-trainer score), name their columns "
        "with `columns: {chosen_reward: theirs, rejected_reward: theirs}`, or use kind: dpo\n"
        "1 problem found\n"
    )


def test_global_batch_size_that_does_not_divide_by_the_processes(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpo_trainer.trainers.base_config import BaseConfig

    pairs(tried.folder)
    monkeypatch.setattr(BaseConfig, "world_size", property(lambda self: 4))
    text = ON_DATA.replace("global_batch_size: 2", "global_batch_size: 18\n    micro_batch_size: 2")
    assert tried.refused(text, command="check").startswith(
        "chain.yaml:12 (stages.rpo.global_batch_size): global_batch_size 18 does not divide by 4 "
        "rank(s) × per_device_train_batch_size 2\n"
        "  why: every micro-batch of every rank holds the same number of examples\n"
        "  fix: take 16 or 24, or another number of ranks\n"
    )


def test_warm_up_longer_than_the_epochs(tried: Tried) -> None:
    pairs(tried.folder)
    more = "    num_train_epochs: 2\n    warmup_steps: 7\n    lr_scheduler_type: linear\n"
    assert tried.refused(ON_DATA + more, command="check").startswith(
        "chain.yaml:15 (stages.rpo.warmup_steps): `warmup_steps` is 7, longer than the stage, which "
        "has 6 steps\n  why: the learning rate would never reach its peak\n"
        "  fix: write at most 6, or raise `num_train_epochs`\n"
    )


TEN_LATER = """\
model:
  from_config: {model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
    num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 64}
  tokenizer: characters
defaults: {learning_rate: 1e-5, global_batch_size: 2, max_length: 64}
stages:
  - name: one
    kind: rpo
    beta: 0.1
    data: {train: [{path: absent.jsonl}]}
    optim: adam_typo
    max_length: 65
    reference: ./nowhere
  - name: two
    kind: dpo
    beta: 0.1
    data: {train: [{path: cut.jsonl}]}
    training_args: {adam_eps: 1}
    peft: {rang: 2}
    init: ./elsewhere
  - name: three
    kind: dpo
    beta: 0.1
    data: {train: [{path: pairs.jsonl}]}
    lr_scheduler_type: liner
  - name: four
    kind: dpo
    beta: 0.1
    data: {train: [{path: pairs.jsonl}]}
    warmup_steps: 9
    lr_scheduler_type: linear
"""


def test_ten_mistakes_that_are_not_in_the_text_have_their_lines_too(tried: Tried) -> None:
    pairs(tried.folder)
    (tried.folder / "cut.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"pro'
    )
    shown = tried.refused(TEN_LATER, command="check", code=3)
    places = re.findall(r"^chain\.yaml:(\d+) \(\S+\): ", shown, re.MULTILINE)
    assert [int(line) for line in places] == [10, 11, 12, 13, 17, 18, 19, 20, 25, 30]
    assert "(stages.one.data): absent.jsonl: no such file" in shown
    assert "(stages.two.data): cut.jsonl:2: the last line is cut" in shown
    assert shown.endswith("\n10 problems found\n")


# --- all at once ---

TEN = """\
model:
  name_or_path: base
  dtipe: bfloat16
seed: "3"
defaults:
  weight_decay: -1
  global_batch_size: 8
stages:
  - name: sft
    kind: sft
    data: {train: []}
    learning_rate: 1e-5
    num_train_epochs: 1
    max_steps: 10
  - name: sft
    kind: dpo
    data: {train: [{path: pairs.jsonl}]}
    learning_rate: 1e-5
    learning_rate: 1e-6
    reference: later
    rpo_alpha: 1
    beta: .nan
"""


def test_ten_mistakes_are_listed_as_ten_each_with_its_line(tried: Tried) -> None:
    shown = tried.refused(TEN, command="check")
    places = re.findall(r"^chain\.yaml:(\d+) \(\S+\): ", shown, re.MULTILINE)
    assert [int(line) for line in places] == [3, 4, 6, 11, 14, 15, 19, 20, 21, 22]
    assert shown.endswith("\n10 problems found\n")
