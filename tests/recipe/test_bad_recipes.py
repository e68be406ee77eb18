"""Bad recipes: each gets an error with code, place, what, why and fix; nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.cli.commands import main
from rpo_trainer.recipe import DPOStage, load_recipe
from tests.chain import tiny

Capture = pytest.CaptureFixture[str]


def changed(valid: str, old: str, new: str) -> str:
    assert old in valid
    return valid.replace(old, new, 1)


def starts(shown: str, place: str, code: str) -> bool:
    """Whether the first error shown is this one."""
    first = shown.splitlines()[0]
    return first.startswith(f"{place}: ") and first.endswith(f" [{code}]")


class Tried:
    """Pass a recipe to the command line, in an empty directory."""

    def __init__(self, folder: Path, capture: Capture) -> None:
        self.folder, self.capture = folder, capture
        self.path = folder / "chain.yaml"

    def refused(
        self, text: str | bytes, *overrides: str, command: str = "run", code: int = 2
    ) -> str:
        """Return the output without the directory; check that each of the errors is complete."""
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.refused_as_it_is(*overrides, command=command, code=code)

    def refused_as_it_is(self, *overrides: str, command: str = "run", code: int = 2) -> str:
        before = tiny.written(self.folder)
        with pytest.raises(SystemExit) as end:
            main([command, str(self.path), *overrides, "--run-dir", str(self.folder / "run")])
        shown = self.capture.readouterr().err
        assert end.value.code == code, shown
        assert tiny.written(self.folder) - {"run/.lock"} == before
        assert "Traceback" not in shown
        errors = shown.removeprefix("error: ").replace(f"{self.folder}/", "")
        *problems, _ = re.split(r"\n(?! )", errors.rstrip("\n"))
        for problem in problems:
            assert re.fullmatch(r"\S.*: .+(\n  why: .+)?\n  fix: .+", problem), problem
        return errors


@pytest.fixture
def tried(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Tried:
    monkeypatch.chdir(tmp_path)
    return Tried(tmp_path, capsys)


DPO = "    beta: 0.1\n"

# case: replaced text, replacement, code, place, names and values in the message
CASES: dict[str, tuple[str, str, str, str, list[str]]] = {
    "key typo": (
        DPO, f"{DPO}    bta: 3\n",
        "recipe.unknown-key", "18 (stages.dpo.bta)", ["`bta`", "`beta`?"],
    ),
    "key at the wrong level": (
        "defaults:", "beta: 1\ndefaults:",
        "recipe.misplaced-key", "3 (beta)", ["kind dpo"],
    ),
    "key given twice": (
        DPO, f"{DPO}    beta: 0.2\n",
        "recipe.repeated-key", "18 (stages.dpo.beta)", ["17"],
    ),
    "wrong type": (
        "[{path: pairs.jsonl}]", "pairs.jsonl",
        "recipe.wrong-type", "18 (stages.dpo.data.train)", ["'pairs.jsonl'", "`- `"],
    ),
    "a number in quotes": (
        DPO, "    beta: '0.1'\n",
        "recipe.wrong-type", "17 (stages.dpo.beta)", ["'0.1'", "quotes"],
    ),
    "β that is NaN": (
        DPO, "    beta: .nan\n",
        "recipe.not-finite", "17 (stages.dpo.beta)", ["nan"],
    ),
    "β that is infinite": (
        DPO, "    beta: .inf\n",
        "recipe.not-finite", "17 (stages.dpo.beta)", ["inf"],
    ),
    "β that is 0": (
        DPO, "    beta: 0\n",
        "recipe.out-of-range", "17 (stages.dpo.beta)", ["got 0"],
    ),
    "β that is negative": (
        DPO, "    beta: -0.1\n",
        "recipe.out-of-range", "17 (stages.dpo.beta)", ["got -0.1"],
    ),
    "shuffle: no": (
        DPO, f"{DPO}    shuffle: no\n",
        "recipe.unknown-key", "18 (stages.dpo.shuffle)", ["`training_args`"],
    ),
    "two documents": (
        "defaults:", "---\ndefaults:",
        "recipe.invalid-yaml", "3", ["`---`"],
    ),
    "tabs": (
        "  name_or_path", "\tname_or_path",
        "recipe.invalid-yaml", "2", ["tab"],
    ),
    "!!python/object": (
        "base", "!!python/object/apply:os.system [ls]",
        "recipe.invalid-yaml", "2", ["`!!python/object/apply:os.system`"],
    ),
    "missing model": (
        "model:\n  name_or_path: base\n", "",
        "recipe.missing-field", "1", ["`model: ...`"],
    ),
    "two stages of one name": (
        "name: sft\n", "name: code-sft\n",
        "recipe.duplicate-stage", "10 (stages.code-sft.name)", ["`code-sft`"],
    ),
    "a stage that refers to a later one": (
        DPO, f"{DPO}    init: rpo\n",
        "recipe.later-stage", "18 (stages.dpo.init)", ["`rpo`", "`sft`", "./name"],
    ),
    "unknown loss": (
        DPO, f"{DPO}    loss_type: dpoo\n",
        "recipe.invalid-choice", "18 (stages.dpo.loss_type)", ["`ipo`", "mean `dpo`?"],
    ),
    "rpo_alpha": (
        DPO, f"{DPO}    rpo_alpha: 1\n",
        "recipe.unknown-key", "18 (stages.dpo.rpo_alpha)", ["`sft_loss_weight`"],
    ),
    "epochs and max_steps both": (
        DPO, f"{DPO}    num_train_epochs: 1\n    max_steps: 5\n",
        "recipe.conflicting-fields", "19 (stages.dpo.max_steps)", ["`num_train_epochs`"],
    ),
    "bf16 and fp16 both": (
        DPO, f"{DPO}    training_args: {{bf16: true, fp16: true}}\n",
        "recipe.conflicting-fields", "18 (stages.dpo.training_args.fp16)", ["`bf16`"],
    ),
    "fp16 beside the dtype of the model": (
        DPO, f"{DPO}    training_args: {{fp16: true}}\n",
        "recipe.conflicting-fields", "18 (stages.dpo.training_args.fp16)", ["bfloat16", "`dtype: float16`"],
    ),
    "global_batch_size that does not divide by the micro-batch": (
        DPO, f"{DPO}    micro_batch_size: 3\n",
        "recipe.batch-not-divisible", "5 (defaults.global_batch_size)", ["8", "3", "6 or 9"],
    ),
    "warm-up longer than the run": (
        DPO, f"{DPO}    max_steps: 5\n    warmup_steps: 6\n    lr_scheduler_type: linear\n",
        "recipe.warmup-too-long", "19 (stages.dpo.warmup_steps)", ["6", "5"],
    ),
    "on_nonfinite that is neither": (
        DPO, f"{DPO}    on_nonfinite: skip(3)\n",
        "recipe.invalid-choice", "18 (stages.dpo.on_nonfinite)", ["`stop`", "`skip`"],
    ),
    "skipped steps of a stage that stops": (
        DPO, f"{DPO}    max_skipped_steps: 3\n",
        "recipe.unused-field", "18 (stages.dpo.max_skipped_steps)", ["`on_nonfinite: skip`"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_recipe(case: str, tried: Tried, valid: str) -> None:
    old, new, code, place, words = CASES[case]
    shown = tried.refused(changed(valid, old, new))
    first, *_, total = shown.splitlines()
    assert first.startswith(f"chain.yaml:{place}: ") and first.endswith(f" [{code}]")
    assert [word for word in words if word not in shown] == [], shown
    assert total.startswith("1 ")


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


# --- the entire file ---


@pytest.mark.parametrize("text", ["", "\n\n", "# later\n"])
def test_an_empty_file(text: str, tried: Tried) -> None:
    shown = tried.refused(text)
    assert starts(shown, "chain.yaml:1", "recipe.invalid-yaml")
    assert "`model`" in shown and "`stages`" in shown


def test_a_list_at_the_top(tried: Tried) -> None:
    shown = tried.refused("- model: base\n- stages: []\n")
    assert starts(shown, "chain.yaml:1", "recipe.not-a-mapping")
    assert "`model:`" in shown and "`stages:`" in shown


def test_no_stages(tried: Tried, valid: str) -> None:
    head = valid[: valid.index("stages:")]
    assert starts(tried.refused(head), "chain.yaml:1", "recipe.missing-field")
    shown = tried.refused(f"{head}stages: []\n")
    assert starts(shown, "chain.yaml:6 (stages)", "recipe.empty-field")


def test_an_anchor(tried: Tried, valid: str) -> None:
    """Refused at its own place, before the alias: `defaults` holds shared values."""
    shown = tried.refused(valid + "a0: &a0 [1, 1]\na1: [*a0, *a0]\n")
    assert starts(shown, "chain.yaml:24", "recipe.invalid-yaml") and "`&a0`" in shown
    assert "`defaults`" in shown.partition("  fix: ")[2]


def test_tags_run_no_code(tried: Tried, valid: str) -> None:
    tried.refused(changed(valid, "base", "!!python/object/apply:os.mkdir [run]"))
    tried.refused(changed(valid, "base", '!!python/object/new:os.system ["touch run"]'))


# --- the path ---


def test_a_path_that_is_a_directory(tried: Tried) -> None:
    tried.path.mkdir()
    (tried.path / "mine.yaml").write_text("")
    shown = tried.refused_as_it_is()
    assert starts(shown, "chain.yaml", "recipe.not-a-file")
    assert "chain.yaml/mine.yaml" in shown


def test_a_path_that_is_absent(tried: Tried) -> None:
    (tried.folder / "chian.yaml").write_text("")
    shown = tried.refused_as_it_is()
    assert starts(shown, "chain.yaml", "recipe.no-such-file") and "`chian.yaml`" in shown


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
    assert starts(shown, "chain.yaml", "recipe.unreadable-file") and "Permission denied" in shown


def test_a_path_whose_bytes_are_not_utf_8(tried: Tried, valid: str) -> None:
    shown = tried.refused(valid.encode().replace(b"base", b"caf\xe9"))
    assert starts(shown, "chain.yaml:2", "recipe.not-utf8") and "26" in shown


# --- overrides ---


@pytest.mark.parametrize(
    ("words", "code", "word"),
    [
        (["stages.dpo.bta=1"], "recipe.unknown-key", "`beta`?"),
        (["stages.dpo.beta"], "option.missing-value", "`=`"),
        (["stages.dpo.beta="], "option.missing-value", "null"),
        (["--stages.dpo.beta"], "option.missing-value", "null"),
        (["stages.dop.beta=1"], "option.unknown-stage", "`dpo`?"),
    ],
    ids=["of an unknown key", "without =", "without value", "--key without value", "of no stage"],
)
def test_an_override(words: list[str], code: str, word: str, tried: Tried, valid: str) -> None:
    shown = tried.refused(valid, *words)
    assert starts(shown, f"override {words[0]}", code) and word in shown


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
    assert "[recipe.secret]" in shown
    assert "hush" not in shown and TOKEN not in shown
    assert shown.splitlines()[-1].startswith("1 ")


@pytest.mark.parametrize("value", ["hush", "@hush"])
def test_a_secret_in_an_override(value: str, tried: Tried, valid: str) -> None:
    shown = tried.refused(valid, f"stages.dpo.training_args.hub_token={value}")
    assert shown.startswith("override stages.dpo.training_args.hub_token=...: ")
    assert "hush" not in shown


# --- errors that need the data or the processes ---

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
    assert shown.startswith("chain.yaml:10 (stages.rpo.data): pairs.jsonl: ")
    assert "RPO" in shown and "`score:`" in shown and "kind: dpo" in shown
    assert shown.splitlines()[-1].startswith("1 ")


def test_global_batch_size_that_does_not_divide_by_the_processes(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpo_trainer.trainers.base_config import BaseConfig

    pairs(tried.folder)
    monkeypatch.setattr(BaseConfig, "world_size", property(lambda self: 4))
    text = ON_DATA.replace("global_batch_size: 2", "global_batch_size: 18\n    micro_batch_size: 2")
    shown = tried.refused(text, command="check")
    assert shown.startswith("chain.yaml:12 (stages.rpo.global_batch_size): ")
    assert "18" in shown and "16 or 24" in shown


def test_warm_up_longer_than_the_epochs(tried: Tried) -> None:
    pairs(tried.folder)
    more = "    num_train_epochs: 2\n    warmup_steps: 7\n    lr_scheduler_type: linear\n"
    shown = tried.refused(ON_DATA + more, command="check")
    assert shown.startswith("chain.yaml:15 (stages.rpo.warmup_steps): ")
    assert "7" in shown and "6" in shown and "`num_train_epochs`" in shown


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
    assert "(stages.one.data): absent.jsonl: " in shown
    assert "(stages.two.data): cut.jsonl:2: " in shown
    assert shown.splitlines()[-1].startswith("10 ")


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
    assert shown.splitlines()[-1].startswith("10 ")
