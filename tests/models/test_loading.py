"""Models and tokenizers from a recipe."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import ModelError
from rpo_trainer.models.loading import (
    check_vocabulary,
    load_config,
    load_model,
    load_model_named,
    load_tokenizer,
    load_tokenizer_named,
    load_weights,
)
from rpo_trainer.recipe import ModelSpec
from tests.raising import raises

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def random_spec(**changes: Any) -> ModelSpec:
    return ModelSpec(from_config={**CONFIG, **changes}, tokenizer="characters")


def model_of(spec: ModelSpec, base: Path, seed: int = 0) -> Any:
    return load_model(spec, base, seed=seed, vocabulary=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, a model and its tokenizer, its weights in bfloat16."""
    base = tmp_path_factory.mktemp("loading")
    model_of(random_spec(), base).to(torch.bfloat16).save_pretrained(base / "model")
    character_tokenizer().save_pretrained(base / "model")
    return base


# --- random weights ---


def test_random_weights_follow_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = model_of(random_spec(), tmp_path).state_dict()
    torch.manual_seed(2)
    again = model_of(random_spec(), tmp_path).state_dict()
    other = model_of(random_spec(), tmp_path, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["lm_head.weight"].shape == (100, 16)  # the tokenizer's size by default


def test_the_vocabulary_may_be_larger_than_the_tokenizer(tmp_path: Path) -> None:
    assert model_of(random_spec(vocab_size=128), tmp_path).config.vocab_size == 128
    with raises("tokenizer.too-many-tokens", ModelError, where="model") as error:
        model_of(random_spec(vocab_size=64), tmp_path)
    assert re.findall(r"\d+", error.value.what) == ["100", "64"]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"hiden_size": 64}, "unknown-config-field", "llama.*`hiden_size`.*`hidden_size`"),
        ({"zzz": 64}, "unknown-config-field", "llama.*`zzz`"),
        ({"hidden_size": "wide"}, "bad-config", "hidden_size.*int.*str"),
        ({"num_attention_heads": 5}, "bad-config", "attention heads"),
        ({"num_attention_heads": 0}, "bad-config", "ZeroDivisionError"),
        ({"hidden_act": "swish9"}, "bad-config", "swish9"),
        ({"model_type": "lama"}, "bad-config", "lama"),
        ({"model_type": "vit"}, "unknown-config-field", "vit"),
    ],
)
def test_a_bad_configuration_is_named(
    changes: dict[str, Any], code: str, words: str, tmp_path: Path
) -> None:
    with raises(f"model.{code}", ModelError, where="model.from_config") as error:
        model_of(random_spec(**changes), tmp_path)
    assert re.search(f"(?s){words}", f"{error.value.what} {error.value.fix}")
    assert error.value.why and error.value.fix
    assert len(str(error.value)) < 500  # not a list of all model types


def test_fields_of_other_names_are_taken(tmp_path: Path) -> None:
    spec = ModelSpec(
        from_config={"model_type": "gpt2", "hidden_size": 16, "n_layer": 1, "n_head": 2},
        tokenizer="characters",
    )
    assert model_of(spec, tmp_path).config.n_embd == 16
    assert model_of(random_spec(rope_theta=5e4), tmp_path) is not None


# --- directories ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_weights_are_float32_whatever_the_arithmetic(dtype: str, folder: Path) -> None:
    stored = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    assert stored.dtype == torch.bfloat16
    for model in (
        model_of(ModelSpec(name_or_path="model", dtype=dtype), folder),  # type: ignore[arg-type]
        model_of(random_spec(), folder),
        load_weights(folder / "model"),
    ):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_paths_are_relative_to_the_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = ModelSpec(name_or_path="./model")
    model = model_of(spec, folder)
    assert load_tokenizer(spec, folder).eos_token == "</s>"
    assert model_of(ModelSpec(name_or_path=str(folder / "model")), tmp_path) is not None
    # The path written into adapters works from any directory.
    assert model.config._name_or_path == model.name_or_path == str(folder / "model")
    assert load_weights(Path(os.path.relpath(folder / "model"))).name_or_path == str(
        folder / "model"
    )


@pytest.mark.parametrize("name", ["./absent", "nobody/no-such-model", "/absent"])
def test_what_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    spec = ModelSpec(name_or_path=name)
    code = "model.not-found" if name.startswith((".", "/")) else "model.cannot-load"
    for load in (load_tokenizer, model_of):
        with raises(code, ModelError, where=f"model: {name}") as error:
            load(spec, tmp_path)
        assert "safetensors" in str(error.value)
        assert "\n" not in error.value.what
    with raises("model.not-found", ModelError, where=str(tmp_path / "absent")):
        load_weights(tmp_path / "absent")


def test_the_nearest_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiny-model").mkdir()
    with raises("model.not-found", ModelError) as error:
        load_tokenizer(ModelSpec(name_or_path="./tiny-modell"), tmp_path)
    assert "`tiny-model`" in error.value.what


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    model = load_weights(folder / "model")
    shutil.copytree(folder / "model", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for load in (
        lambda: model_of(ModelSpec(name_or_path="pickled"), tmp_path),
        lambda: load_weights(tmp_path / "pickled"),
    ):
        with raises("model.cannot-load", ModelError) as error:
            load()
        assert "safetensors" in str(error.value)


def test_damaged_weights_are_an_error_for_people(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with raises("model.cannot-load", ModelError):
        load_weights(tmp_path / "model")
    with raises("model.cannot-load", ModelError):
        model_of(ModelSpec(name_or_path="model"), tmp_path)
    (tmp_path / "model" / "config.json").write_text("{")
    with raises("model.cannot-load", ModelError):
        load_weights(tmp_path / "model")


def test_code_from_a_repository_is_not_run(folder: Path, tmp_path: Path) -> None:
    import json

    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["model_type"] = "strange"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\nclass Config: pass\nclass Model: pass\n"
    )
    with raises("model.needs-remote-code", ModelError):
        model_of(ModelSpec(name_or_path="model"), tmp_path)
    with raises("model.needs-remote-code", ModelError):
        load_weights(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


# --- tokenizers ---


def test_the_character_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(random_spec(), tmp_path)
    assert tokenizer("ab")["input_ids"] == [1, 69, 70]
    assert tokenizer.chat_template is None


def test_another_tokenizer_than_the_models(folder: Path, tmp_path: Path) -> None:
    spec = ModelSpec(name_or_path=str(folder / "model"), tokenizer="characters")
    assert len(load_tokenizer(spec, tmp_path)) == 100
    elsewhere = ModelSpec(from_config=CONFIG, tokenizer="model")
    assert len(load_tokenizer(elsewhere, folder)) == 100


def test_random_weights_bring_no_tokenizer(tmp_path: Path) -> None:
    spec = ModelSpec.model_construct(from_config=CONFIG, name_or_path=None, tokenizer=None)
    with raises("tokenizer.missing", ModelError, where="model.tokenizer"):
        load_tokenizer(spec, tmp_path)


def test_chat_templates_are_built_in_or_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def template(name: str) -> Any:
        spec = ModelSpec(from_config=CONFIG, tokenizer="characters", chat_template=name)
        return load_tokenizer(spec, tmp_path).chat_template

    assert "Assistant:" in template("plain")
    (tmp_path / "mine.jinja").write_text("{{messages[0].content}}")
    assert template("mine.jinja") == "{{messages[0].content}}"
    assert template(str(tmp_path / "mine.jinja")) == "{{messages[0].content}}"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert template("~/mine.jinja") == "{{messages[0].content}}"
    with pytest.raises(ModelError, match=r"'other\.jinja'"):
        template("other.jinja")
    with pytest.raises(ModelError, match=r"<\|im_start\|>"):
        template("chatml")


def test_more_tokens_than_embeddings(folder: Path) -> None:
    model = load_weights(folder / "model")
    check_vocabulary(model, 100)
    check_vocabulary(model, 64)
    with raises("tokenizer.too-many-tokens", ModelError) as error:
        check_vocabulary(model, 101)
    assert re.findall(r"\d+", error.value.what) == ["101", "100"]


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        (True, True), (False, True), (HFValidationError("no name"), True),
        (ConnectionError("no network"), False), (TimeoutError("too slow"), False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("named", [False, True], ids=["recipe", "trainer"])
def test_without_a_network_only_the_cache_is_read(
    answer: bool | Exception,
    asked: bool,
    named: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """transformers would retry for 45 s before it reads the cache."""

    def file_exists(self: object, name: str, file: str, *, repo_type: str, revision: str) -> bool:
        assert (name, repo_type, revision) == ("some/model", "model", "v1")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def from_pretrained(name: str, **settings: Any) -> Any:
        given.append((name, settings["revision"], bool(settings.get("local_files_only"))))
        raise OSError("it is not there")

    given: list[tuple[str, str, bool]] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", file_exists)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    spec, settings = ModelSpec(name_or_path="some/model", revision="v1"), {"revision": "v1"}
    calls: list[Callable[[], Any]] = [
        lambda: load_tokenizer(spec, tmp_path), lambda: load_config(spec, tmp_path, None, 0)
    ]  # fmt: skip
    if named:
        calls = [
            lambda: load_tokenizer_named("some/model", settings),
            lambda: load_model_named("some/model", settings=settings),
        ]
    for call, what in zip(calls, ("tokenizer", "model"), strict=True):
        with raises("model.cannot-load", ModelError) as error:
            call()
        assert given.pop() == ("some/model", "v1", not asked) and not given
        assert str(error.value.where).endswith("some/model") and what in error.value.what
        assert ("it is not there" in error.value.what) is asked
        assert ("hf download some/model" in str(error.value)) is not asked


@pytest.mark.parametrize("name", ["./runs/absent", "a/b/c", "my model", "~/absent"])
def test_a_misspelled_path_is_refused_without_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def requested(*_: Any) -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rpo_trainer.models.loading.hub_answers", requested)
    spec = ModelSpec(name_or_path=name)
    calls: list[Callable[[], Any]] = [
        lambda: load_tokenizer(spec, tmp_path), lambda: load_config(spec, tmp_path, None, 0),
        lambda: load_tokenizer_named(name), lambda: load_model_named(name),
    ]  # fmt: skip
    for call in calls:
        with raises("model.not-found", ModelError) as error:
            call()
        assert str(error.value.where).endswith(name)
