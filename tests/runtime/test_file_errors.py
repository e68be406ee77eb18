"""Foreign files that are damaged, endless or not files: an error names them, without a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from rpo_trainer.data import load_rows, set_chat_template
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.data.rows import RowError, reward_fault
from rpo_trainer.data.template_limits import TemplateLimit, time_limit
from rpo_trainer.data.trained_spans import ChatRenderer
from rpo_trainer.errors import DataError, ModelError, RecipeError, RPOTrainerError
from rpo_trainer.models import adapter_files, loading
from rpo_trainer.models import preload_checks as model_checks
from rpo_trainer.models.adapters import load_adapter
from rpo_trainer.models.loading import load_config, load_tokenizer, saved_config
from rpo_trainer.recipe import ModelSpec, SourceSpec, load_recipe
from rpo_trainer.rewards.judge import read_template
from rpo_trainer.runtime.file_errors import reading, require_sizes
from rpo_trainer.runtime.files import TRUNCATED, read_text, refusal
from tests.raising import codes_of, raises
from tests.rewards.policies import llama

BROKEN = {
    "list": b"[]", "number": b"5", "null": b"null", "text": b'"x"', "cut": b'{"peft', "empty": b"",
    "deep": b"[" * 100_000, "deep objects": b'{"a":' * 50_000, "zeros": b"\0" * 64,
    "utf-16": '{"a": 1}'.encode("utf-16"), "latin-1": b'{"a": "\xe9"}',
}  # fmt: skip
SPEC = ModelSpec(name_or_path="model", dtype="float32")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    llama().save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _load(place: Path) -> None:
    """What `check` does with a model."""
    config = saved_config(place / "model", "here")
    load_tokenizer(SPEC, place)
    model_checks.check_unread(config, place / "model", tokens=5, reward=False, where="here")


def _forever() -> None:
    with time_limit(0.05):
        while True:
            pass


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_of_a_model(file: str, content: bytes, place: Path) -> None:
    (place / "model" / file).write_bytes(content)
    with pytest.raises(ModelError) as error:
        _load(place)
    assert error.value.where in ("here", "model: model")


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_damaged_index_of_weights(content: bytes, place: Path) -> None:
    config = saved_config(place / "model", "here")
    (place / "model" / "model.safetensors").unlink()
    (place / "model" / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelError) as error:
        model_checks.check_unread(config, place / "model", tokens=5, reward=False, where="here")
    assert error.value.where == "here"


@pytest.mark.parametrize(
    "content", [*BROKEN.values(), b'{"base_model_name_or_path": 5}'], ids=[*BROKEN, "wrong type"]
)
def test_a_damaged_adapter(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with raises("model.unreadable", ModelError) as error:
        adapter_files.base_of(tmp_path)
    assert str(tmp_path) in str(error.value.where)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "os.system"}, {"rope_parameters": 5}, {"model_type": 5},
     {"num_hidden_layers": 10**15}, {"vocab_size": 10**15}],
    ids=str,
)  # fmt: skip
def test_wrong_values_in_a_configuration(change: dict[str, Any], place: Path) -> None:
    path = place / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError):
        require_sizes(load_config(SPEC, place, None, 5), "here").get_text_config()


def test_our_own_errors_and_those_of_devices_pass() -> None:
    for error in (
        RecipeError("ours", code="recipe.ours"),
        RuntimeError("CUDA error"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)), reading("it", "here"):
            raise error
    for error in (RecursionError(), OverflowError("x"), AssertionError("x")):
        with raises("model.unreadable", where="here") as raised, reading("the model", "here"):
            raise error
        assert type(error).__name__ in raised.value.what


FAILURES: dict[str, tuple[type[Exception], str]] = {
    "python": (MemoryError, ""),
    "cpu": (
        RuntimeError,
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    ),
    "gpu": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    "device": (RuntimeError, "CUDA error: no kernel image is available"),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("what", ["directory", "name", "from_config", "adapter"])
def test_memory_and_devices_are_no_fault_of_the_files(
    what: str, case: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        kind, text = FAILURES[case]
        raise kind(text)

    base: Any = llama()
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(place / "adapter")
    for owner, name in (
        (AutoModelForCausalLM, "from_pretrained"), (AutoModelForCausalLM, "from_config"),
        (PeftModel, "from_pretrained"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, fails)
    spec = ModelSpec(from_config={"model_type": "llama"}, tokenizer="characters", dtype="float32")
    load = {
        "directory": lambda: loading.load_weights(place / "model"),
        "name": lambda: loading.load_model_named(str(place / "model")),
        "from_config": lambda: loading.load_model(spec, place, seed=0, vocabulary=9),
        "adapter": lambda: load_adapter(base, place / "adapter", trainable=True),
    }[what]
    with pytest.raises(RuntimeError if case == "device" else ModelError) as error:
        load()
    assert case == "device" or codes_of(error.value) == ["model.out-of-memory"]


# --- pipes, devices, loops ---


def special(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.name)


KINDS = ("pipe", "device", "directory", "loop")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_with_something_else_than_files(file: str, kind: str, place: Path) -> None:
    special(place / "model" / file, kind)
    with pytest.raises(RPOTrainerError):
        _load(place)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.jsonl.gz"])
def test_data_that_is_no_file(name: str, kind: str, tmp_path: Path) -> None:
    special(tmp_path / name, kind)
    sources = [SourceSpec(path=name)]
    with pytest.raises(DataError) as error:
        load_rows(sources, kind="sft", base_dir=tmp_path, audit=Audit(), seed=0)
    assert name in str(error.value.where)


def test_a_pipe_in_a_saved_data_set(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    special(tmp_path / "rows" / "a.arrow", "pipe")
    with pytest.raises(DataError, match=r"a\.arrow.*pipe"):
        load_rows([SourceSpec(path="rows")], kind="sft", base_dir=tmp_path, audit=Audit(), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_named_texts_that_are_no_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    special(path, kind)
    with pytest.raises(ModelError):
        set_chat_template(character_tokenizer(), path)
    with pytest.raises(RecipeError):
        read_template(path)
    with pytest.raises(RPOTrainerError):
        load_recipe(path)


def test_texts_have_a_limit(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 11)
    with pytest.raises(ValueError, match="10 bytes"):
        read_text(tmp_path / "text", 10)


# --- chat templates ---

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
REFUSED = {
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{{ range(10**9) }}",
    "division": "{{ 1 / 0 }}",
    "types": "{{ 1 + 'a' }}",
    "index": "{{ messages[9].x.y }}",
}


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED)
def test_templates_that_fail_refuse_the_row(template: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RowError) as error:
        ChatRenderer(tokenizer).prompt([{"role": "user", "content": "a"}])
    assert error.value.code == "template.refuses-row"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a template is tried in a fork")
@pytest.mark.parametrize("template", [ENDLESS, "{{ 'a' * 10**11 }}", "{{ 'a'.center(10**11) }}"])
def test_a_template_that_takes_all_time_or_memory(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpo_trainer.data.template_limits._PROBE_SECONDS", 1.0)
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(ModelError) as error:
        set_chat_template(character_tokenizer(), tmp_path / "t.jinja")
    assert error.value.where == "model.chat_template"


def test_a_template_that_does_not_end_on_a_row() -> None:
    """Fast on the short conversation that it is tested with."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'slow' %}" + ENDLESS + "{% endif %}x"
    renderer = ChatRenderer(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rpo_trainer.data.trained_spans.time_limit", lambda: time_limit(0.3))
        with pytest.raises(RowError) as error:
            renderer.prompt([{"role": "user", "content": "slow"}])
        assert error.value.code == "template.refuses-row" and "0 s)" in str(error.value)
        assert renderer.prompt([{"role": "user", "content": "quick"}]).text == "x"


def test_the_time_limit_interrupts_and_leaves_nothing_behind() -> None:
    for _ in range(3):
        with pytest.raises(TemplateLimit):
            _forever()
    with time_limit(10.0):
        assert sum(range(1000)) == 499500


# --- the file system ---


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EFBIG, "x"), "File too large"),
        (IsADirectoryError(errno.EISDIR, "x", "a"), "Is a directory"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), TRUNCATED),
        (RuntimeError("unexpected pos 64 vs 0"), TRUNCATED),
        (RuntimeError("basic_ios::clear: iostream error"), TRUNCATED),
        (ValueError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("CUDA out of memory"), None),
        (KeyError("x"), None),
    ],
)  # fmt: skip
def test_what_the_file_system_refuses(error: Exception, said: str | None) -> None:
    found = refusal(error)
    assert found is None if said is None else said in str(found)


def test_a_full_disk_that_another_error_hides() -> None:
    error = RuntimeError("unexpected pos 64 vs 0")
    error.__context__ = OSError(errno.ENOSPC, "x")
    assert refusal(error) == "No space left on device"


# --- numbers ---


@pytest.mark.parametrize("reward", [1e308, -1e308, 1e31, 10**400, float("inf"), float("nan")])
def test_rewards_beyond_all_measure(reward: float) -> None:
    assert reward_fault(reward) is not None
    assert reward_fault(1e29) is None


@pytest.mark.parametrize(
    "override",
    ["stages.a.max_length", "stages.a.global_batch_size", "stages.a.max_steps",
     "stages.a.save_steps", "stages.a.data.train.0.size", "stages.a.data.train.0.max_rows"],
)  # fmt: skip
@pytest.mark.parametrize("value", [10**15, 2**63, 10**400])
def test_sizes_of_a_recipe_have_limits(override: str, value: int, tmp_path: Path) -> None:
    recipe = {
        "model": {"name_or_path": "m"},
        "stages": [{
            "name": "a", "kind": "sft", "learning_rate": 1e-3, "global_batch_size": 8,
            "max_steps": 1,
            "data": {"train": [{"task": "quickstart/code", "split": "train", "size": 9}]},
        }],
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RPOTrainerError) as error:
        load_recipe(tmp_path / "r.yaml", [f"{override}={value}"])
    assert override.rsplit(".", 1)[-1] in str(error.value)
