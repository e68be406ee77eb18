"""Inputs of a run that change between two starts: refused at the next start, or allowed by their key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rpo_trainer.chain.input_files import Digests, InputFiles, changed_parts, check_input_files
from rpo_trainer.chain.state import ChainState, plain
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import RecipeError, RunError
from rpo_trainer.recipe import LoadedRecipe, expand_stages
from rpo_trainer.runtime.files import known_digest
from rpo_trainer.stages.hub import hub_commit
from rpo_trainer.stages.record import InputRecord
from tests.chain import tiny
from tests.raising import raises
from tests.rewards.policies import llama

ROW = {"prompt": "1 + 1 = ", "response": "2"}
PAIR = {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"}
MODELS = ("model", "other", "scorer", "below", "policy")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")


def everything(folder: Path) -> tiny.Recipe:
    """A recipe that names an input in every possible way; its models are one small file each."""
    for name in MODELS:
        write(folder / name / "config.json", {"model_type": "llama", "name": name})
        write(folder / name / "model-00001-of-00001.safetensors", f"weights of {name}")
        write(folder / name / "model.safetensors.index.json", {"weight_map": {}})
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                     "added_tokens.json", "generation_config.json", "vocab.json"):  # fmt: skip
            write(folder / name / file, {"file": file})
        write(folder / name / "merges.txt", "a b c d")
        write(folder / name / "chat_template.jinja", "{{ messages }}")
        write(folder / name / "additional_chat_templates" / "tools.jinja", "{{ tools }}")
    write(folder / "adapter" / "adapter_config.json", {"base_model_name_or_path": "../below"})
    write(folder / "adapter" / "adapter_model.safetensors", "weights of the adapter")
    for name in ("train", "held", "nll", "prompts", "more"):
        write(folder / f"{name}.jsonl", ROW)
    write(folder / "pairs.jsonl", PAIR)
    write(folder / "judge.txt", "{prompt} {first} {second} [[A]] [[B]] [[C]]")
    write(folder / "tasks" / "deep" / "own.yaml", "task: own")
    write(folder / "data" / "state.json", "{}")
    write(folder / "data" / "a.arrow", "rows")
    write(folder / "engine.json", {"steps": "many"})
    common = {"global_batch_size": 1, "learning_rate": 1e-3, "max_steps": 1}
    generate = {"responses": 2, "max_new_tokens": 3, "policies": ["init", "./policy"]}
    return {
        "model": {"name_or_path": "./model"},
        "stages": [
            {
                "name": "sft", "kind": "sft", **common, "init": "./adapter",
                "peft": {"r": 4, "target_modules": ["q_proj"], "between_stages": "keep"},
                "data": {"train": [{"path": "train.jsonl"}, {"path": "./data"}],
                         "eval": [{"path": "held.jsonl"}]},
                "training_args": {"deepspeed": str(folder / "engine.json")},
            },
            {
                "name": "dpo", "kind": "dpo", "beta": 0.1, **common, "reference": "./other",
                "init": "model",
                "data": {"train": [{"path": "prompts.jsonl"}], "generate": generate,
                         "score": {"model": "./scorer"}},
            },
        ],
        "eval": {
            "data": [{"path": "more.jsonl"}], "preferences": [{"path": "pairs.jsonl"}],
            "nll": [{"path": "nll.jsonl"}], "generate": {"max_new_tokens": 3},
            "score": {"judge": {"url": "http://localhost:1/v1", "model": "j", "template": "judge.txt"}},
            "lm_eval": {"tasks": ["own"], "include_path": "tasks"},
        },
    }  # fmt: skip


def begun(folder: Path, loaded: LoadedRecipe) -> None:
    """A run in which both stages have begun."""
    stages = expand_stages(loaded.recipe)
    state = ChainState(folder / "run")
    state.adopt(*plain(loaded.recipe, stages, loaded.base_dir))
    inputs, digests = InputFiles(loaded.recipe, stages, loaded.base_dir), Digests()
    for stage, record in zip(stages, state.stages, strict=True):
        record.state, record.inputs = "running", digests.of(inputs.of(stage))
    (folder / "run").mkdir()
    state.save()


def again(folder: Path, loaded: LoadedRecipe, *allowed: str) -> ChainState:
    stages = expand_stages(loaded.recipe)
    state = ChainState(folder / "run")
    state.adopt(*plain(loaded.recipe, stages, loaded.base_dir), allowed=allowed)
    inputs = InputFiles(loaded.recipe, stages, loaded.base_dir)
    check_input_files(stages, state, inputs, folder / "run")
    return state


def rewrite(path: Path) -> None:
    """Write other content of the same size, with the old modification time."""
    before = path.stat()
    text = path.read_text()
    path.write_text(text[:-4] + ("x" if text[-4] != "x" else "y") + text[-3:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


FILES = {
    **{
        f"model/{file}": "model.name_or_path"
        for file in (
            "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
            "added_tokens.json", "generation_config.json", "vocab.json", "merges.txt",
            "chat_template.jinja", "additional_chat_templates/tools.jinja",
        )
    },
    "adapter/adapter_config.json": "stages.sft.init",
    "adapter/adapter_model.safetensors": "stages.sft.init",
    "below/model-00001-of-00001.safetensors": "stages.sft.init",
    "below/config.json": "stages.sft.init",
    "other/model-00001-of-00001.safetensors": "stages.dpo.reference",
    "policy/config.json": "stages.dpo.data.generate.policies.1",
    "scorer/model-00001-of-00001.safetensors": "stages.dpo.data.score.model",
    "scorer/tokenizer.json": "stages.dpo.data.score.model",
    "train.jsonl": "stages.sft.data.train.0",
    "data/a.arrow": "stages.sft.data.train.1",
    "held.jsonl": "stages.sft.data.eval.0",
    "engine.json": "stages.sft.training_args.deepspeed",
    "prompts.jsonl": "stages.dpo.data.train.0",
    "more.jsonl": "eval.data.0",
    "pairs.jsonl": "eval.preferences.0",
    "nll.jsonl": "eval.nll.0",
    "judge.txt": "eval.score.judge.template",
    "tasks/deep/own.yaml": "eval.lm_eval.include_path",
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_changed_input_is_refused_unless_its_key_is_allowed(file: str, tmp_path: Path) -> None:
    loaded = tiny.load(tmp_path, everything(tmp_path))
    begun(tmp_path, loaded)
    assert not again(tmp_path, loaded).changes
    rewrite(tmp_path / file)
    with raises("run.input-changed", RunError) as error:
        again(tmp_path, loaded)
    shown = "./data/a.arrow" if file == "data/a.arrow" else file.split("/", 1)[-1]
    assert FILES[file] in error.value.what and shown in error.value.what
    key = str(error.value.fix).rpartition("--allow-changed ")[2]
    assert FILES[file].startswith(key) and "." in key
    state = again(tmp_path, loaded, key)
    assert state.changes and all(
        change.key.startswith(FILES[file]) and change.old != change.new for change in state.changes
    )
    state.save()
    assert len(again(tmp_path, loaded).changes) == len(state.changes)  # accepted


def test_files_that_come_and_go_are_changes(tmp_path: Path) -> None:
    loaded = tiny.load(tmp_path, everything(tmp_path))
    begun(tmp_path, loaded)
    (tmp_path / "model" / "merges.txt").unlink()
    write(tmp_path / "other" / "tokenizer.model", "pieces")
    with raises("run.input-changed", RunError) as error:
        again(tmp_path, loaded)
    assert "merges.txt (missing)" in error.value.what
    assert "tokenizer.model (new)" in error.value.what


def test_files_that_nothing_reads_may_change(tmp_path: Path) -> None:
    loaded = tiny.load(tmp_path, everything(tmp_path))
    begun(tmp_path, loaded)
    write(tmp_path / "model" / "README.md", "new")
    write(tmp_path / "model" / "manifest.json", "{}")
    write(tmp_path / "model" / "original" / "consolidated.pth", "not read")
    assert not again(tmp_path, loaded).changes


def test_stages_that_have_not_begun_take_what_is_there(tmp_path: Path) -> None:
    loaded = tiny.load(tmp_path, everything(tmp_path))
    begun(tmp_path, loaded)
    state = ChainState(tmp_path / "run")
    state.stages[1].state = "pending"
    state.save()
    rewrite(tmp_path / "other" / "config.json")  # of the second stage only
    assert not again(tmp_path, loaded).changes


def test_an_input_that_cannot_be_allowed_by_a_key_of_nothing(tmp_path: Path) -> None:
    loaded = tiny.load(tmp_path, everything(tmp_path))
    begun(tmp_path, loaded)
    with pytest.raises(RecipeError):
        again(tmp_path, loaded, "eval.absent")


# --- an unchanged file is not read again ---


def test_a_file_that_was_not_written_to_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    first = known_digest(path, None)
    assert "stat" not in first  # changed just now: a second change might leave the same time
    monkeypatch.setattr("rpo_trainer.runtime.files._TIME_STEP_NS", 0)
    kept = known_digest(path, None)
    monkeypatch.setattr(
        "rpo_trainer.runtime.files.file_digest", lambda _: pytest.fail("read again")
    )
    assert known_digest(path, kept) == known_digest(path, None) == kept  # once per process
    monkeypatch.undo()
    rewritten = path.stat()
    path.write_text("two")
    os.utime(path, ns=(rewritten.st_atime_ns, rewritten.st_mtime_ns))
    assert known_digest(path, kept)["digest"] != kept["digest"]


def test_another_file_under_the_name_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpo_trainer.runtime.files._TIME_STEP_NS", 0)
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("one")
    other.write_text("two")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    kept = known_digest(path, None)
    os.replace(other, path)
    assert known_digest(path, kept)["digest"] != kept["digest"]


# --- models and data sets on the hub ---


def on_the_hub(folder: Path) -> tiny.Recipe:
    """`everything`, with data sets of the hub in every list, and a model of the hub below the adapter."""
    recipe = everything(folder)
    write(folder / "adapter" / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    sft, evaluation = recipe["stages"][0], recipe["eval"]
    sft["data"] = {"train": [{"path": "org/train"}, {"path": "train.jsonl"}],
                   "eval": [{"path": "org/held"}]}  # fmt: skip
    for name in ("data", "preferences", "nll"):
        evaluation[name] = [{"path": f"org/{name}", "split": "test"}]
    return recipe


HUB = {
    ("org/base", "model"): "stages.sft.init",
    ("org/train", "dataset"): "stages.sft.data.train",
    ("org/held", "dataset"): "stages.sft.data.eval",
    **{(f"org/{name}", "dataset"): f"eval.{name}" for name in ("data", "preferences", "nll")},
}


@pytest.mark.parametrize("moved", HUB)
def test_another_commit_of_the_hub_is_refused(
    moved: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = dict.fromkeys(HUB, "a" * 40)

    class Api:
        def model_info(self, name: str, *, kind: str = "model", **_: Any) -> Any:
            return SimpleNamespace(sha=commits[name, kind])

        def dataset_info(self, name: str, **options: Any) -> Any:
            return self.model_info(name, kind="dataset", **options)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    loaded = tiny.load(tmp_path, on_the_hub(tmp_path))
    begun(tmp_path, loaded)
    again(tmp_path, loaded)
    commits[moved] = "b" * 40
    with raises("run.input-changed", RunError) as error:
        again(tmp_path, loaded)
    assert f"{moved[0]} (commit)" in error.value.what
    assert f"--allow-changed {HUB[moved].removesuffix('.train').removesuffix('.eval')}" in (
        error.value.fix or ""
    )
    again(tmp_path, loaded, HUB[moved])


@pytest.mark.parametrize("name", ["deepspeed", "fsdp_config", "accelerator_config"])
def test_json_that_stands_in_the_recipe_is_not_a_file(name: str, tmp_path: Path) -> None:
    recipe = everything(tmp_path)
    recipe["stages"][0]["training_args"] = {name: json.dumps({"a": "x" * 300})}
    loaded = tiny.load(tmp_path, recipe)
    stages = expand_stages(loaded.recipe)
    found = InputFiles(loaded.recipe, stages, loaded.base_dir).of(stages[0])
    assert Digests().of(found) and not [one for one in found if "training_args" in one.key]


@pytest.mark.parametrize(
    ("kind", "file"), [("model", "config.json"), ("dataset", "README.md")], ids=str
)
def test_the_commit_is_that_of_the_cache_without_a_network(
    kind: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    commits = ("a" * 40, "b" * 40)
    repo = tmp_path / f"{kind}s--some--model"
    for commit in commits:
        write(repo / "snapshots" / commit / file, "{}")
    found = []
    for commit in commits:
        write(repo / "refs" / "main", commit)
        found.append(hub_commit("some/model", None, kind))
    assert found == list(commits)
    assert hub_commit("some/other", None, kind) is None
    assert hub_commit("no\0name", None, kind) is None
    before, now = (InputRecord("k", "some/model", "model", commit=commit) for commit in found)
    assert changed_parts(before, now) == {"some/model (commit)": commits}


# --- of an entire run ---


@pytest.fixture
def lora(tmp_path: Path) -> tiny.Recipe:
    llama().save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    recipe = tiny.tiny_recipe()
    recipe["model"] = {"name_or_path": "./model", "dtype": "float32"}
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0] |= {
        "max_steps": 2, "save_steps": None, "peft": {"r": 2, "target_modules": "all-linear"},
    }  # fmt: skip
    return recipe


def swap(path: Path) -> None:
    before = path.stat()
    save_file(
        {name: t + torch.ones_like(t) for name, t in load_file(path).items()}, path,
        metadata={"format": "pt"},
    )  # fmt: skip
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_a_finished_run_refuses_other_weights(lora: tiny.Recipe, tmp_path: Path) -> None:
    tiny.run(tmp_path, lora)
    assert tiny.records(tmp_path / "run")["code"]["inputs"]
    swap(tmp_path / "model" / "model.safetensors")
    with raises("run.input-changed", RunError) as error:
        tiny.run(tmp_path, lora)
    assert "model.safetensors" in error.value.what
    tiny.run(tmp_path, lora, allow_changed=["model.name_or_path"])
    tiny.run(tmp_path, lora)  # which was kept
