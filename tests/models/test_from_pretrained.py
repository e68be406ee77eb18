"""Models are loaded completely, from safetensors, and without code of their repositories."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import rpo_trainer
from rpo_trainer import DPOTrainer, RewardTrainer, SFTTrainer
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import ModelError
from rpo_trainer.models.from_pretrained import check_stored
from rpo_trainer.models.loading import load_model, load_model_named, load_weights
from rpo_trainer.models.preload_checks import check_safetensors
from rpo_trainer.models.weight_files import weight_files
from rpo_trainer.recipe import ModelSpec
from rpo_trainer.rewards.reward_model import RewardModel
from tests.raising import raises
from tests.small_models import make_model

Tensors = dict[str, torch.Tensor]


def rewritten(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def with_more(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{k.replace("__", "."): t for k, t in more.items()}}


def prefixed(tensors: Tensors) -> Tensors:
    return {f"student.{name}": t for name, t in tensors.items()}


def cut(tensors: Tensors) -> Tensors:
    name = "model.layers.1.mlp.down_proj.weight"
    return {**tensors, name: tensors[name][:-1].clone()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_model(vocab_size=100).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


LOADERS: dict[str, Callable[[Path], Any]] = {
    "a directory": load_weights,
    "a recipe's model": lambda p: load_model(
        ModelSpec(name_or_path=str(p)), p, seed=0, vocabulary=100
    ),
    "a name": lambda p: load_model_named(str(p)),
    "the headers alone": lambda p: check_stored(
        AutoModelForCausalLM, AutoConfig.from_pretrained(p), p, str(p)
    ),
}
FAULTS = {
    "one missing": (without("layers.1.mlp.down_proj"), "missing", "model.layers.1.mlp.down_proj"),
    "the head missing": (without("lm_head"), "missing", "lm_head.weight"),
    "a prefix": (prefixed, "unknown", "student."),
    "another shape": (cut, "other_shape", "model.layers.1.mlp.down_proj.weight"),
    "one more": (with_more(v_head__weight=torch.ones(3, 3)), "unknown", "v_head.weight"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_named(fault: str, loader: str, saved: Path) -> None:
    change, kind, named = FAULTS[fault]
    LOADERS[loader](saved)
    rewritten(saved, change)
    with raises("model.tensor-mismatch", ModelError) as error:
        LOADERS[loader](saved)
    assert named in error.value.what and str(saved) in str(error.value.where)
    assert error.value.details[kind][0].startswith(named) and error.value.fix


def test_many_tensors_are_counted(saved: Path) -> None:
    rewritten(saved, prefixed)
    with raises("model.tensor-mismatch", ModelError) as error:
        load_weights(saved)
    missing = error.value.details["missing"]
    assert all(name in error.value.what for name in missing[:4]) and len(missing) > 4
    assert missing[4] not in error.value.what and str(len(missing) - 4) in error.value.what


def test_a_part_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    parts = sorted((tmp_path / "model").glob("*-of-*.safetensors"))
    assert len(parts) > 1
    load_weights(tmp_path / "model")
    tensors = load_file(parts[-1])
    name = sorted(tensors)[0]
    save_file({k: t for k, t in tensors.items() if k != name}, parts[-1], metadata={"format": "pt"})
    with raises("model.tensor-mismatch", ModelError, missing=[name], unknown=[]):
        load_weights(tmp_path / "model")


@pytest.mark.parametrize("family", ["tied", "gpt2", "gemma2", "phi3", "mixtral"])
def test_ties_renamings_and_old_masks_are_no_faults(family: str, tmp_path: Path) -> None:
    model = {"mixtral": mixture, "tied": lambda: make_model(tie_word_embeddings=True)}.get(
        family, lambda: make_model(family)
    )()
    model.save_pretrained(tmp_path)
    old = {
        "transformer__h__0__attn__masked_bias": torch.tensor(-1e4),
        "model__layers__0__mask": torch.ones(2, 2, dtype=torch.bool),
    }
    rewritten(tmp_path, with_more(**old))
    load_weights(tmp_path)
    check_stored(AutoModelForCausalLM, AutoConfig.from_pretrained(tmp_path), tmp_path, "")


# Next to the weights that transformers reads, complete or partial.
BESIDE: dict[str, Tensors] = {
    "consolidated": {"layers.0.attention.wq.weight": torch.ones(2, 2)},
    "draft": {"extra.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("size", ["1GB", "20KB"])
@pytest.mark.parametrize("loader", LOADERS)
def test_only_the_files_that_transformers_reads_count(
    loader: str, size: str, saved: Path, tmp_path: Path
) -> None:
    (saved / "model.safetensors").unlink()
    make_model(vocab_size=100).save_pretrained(saved, max_shard_size=size)
    whole = {n: t for p in saved.glob("*.safetensors") for n, t in load_file(p).items()}
    for name, tensors in BESIDE.items():
        save_file(tensors, saved / f"{name}.safetensors", metadata={"format": "pt"})
    (saved / "cut.safetensors").write_bytes(b"version https://git-lfs")
    check_safetensors(saved, "here")
    LOADERS[loader](saved)
    # The contents of the other files are not loaded.
    save_file(whole, saved / "model-of-old.safetensors", metadata={"format": "pt"})
    read = next(p for p in weight_files(saved) if "lm_head.weight" in load_file(p))
    kept = without("lm_head")(load_file(read))
    save_file(kept, read, metadata={"format": "pt"})
    with raises("model.tensor-mismatch", ModelError, missing=["lm_head.weight"]):
        LOADERS[loader](saved)
    for path in weight_files(saved):
        path.unlink()
    code = "model.no-weights" if size == "1GB" else "model.damaged-weights"
    with raises(code, ModelError, where="here"):  # if there are several files, the index remains
        check_safetensors(saved, "here")


COMPUTED: dict[str, tuple[dict[str, Any], str, Tensors]] = {
    "xglm": (
        {"d_model": 16, "ffn_dim": 32, "num_layers": 1, "attention_heads": 2},
        "model.", {"model.embed_positions.weights": torch.ones(34, 16)},
    ),
    "gptj": (
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "rotary_dim": 4},
        "transformer.", {"transformer.h.0.attn.embed_positions": torch.ones(32, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("prefixed_names", [True, False])
@pytest.mark.parametrize("family", COMPUTED)
def test_buffers_that_the_class_computes_are_no_weights(
    family: str, prefixed_names: bool, tmp_path: Path
) -> None:
    settings, prefix, old = COMPUTED[family]
    config = AutoConfig.for_model(family, vocab_size=50, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    more = old if prefixed_names else {n.removeprefix(prefix): t for n, t in old.items()}
    rewritten(tmp_path, lambda tensors: {**tensors, **more})
    load_weights(tmp_path)
    check_stored(AutoModelForCausalLM, AutoConfig.from_pretrained(tmp_path), tmp_path, "")


@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "the headers alone"])
def test_a_damaged_generation_config_is_not_replaced(loader: str, saved: Path) -> None:
    (saved / "generation_config.json").write_text('{"eos_token_id": [3, 7],')
    with raises("model.unreadable-generation-config", ModelError):
        LOADERS[loader](saved)


def mixture() -> Any:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    name = next(n for n in load_file(tmp_path / "model.safetensors") if "experts.3" in n)
    rewritten(tmp_path, without(name))
    for load in (load_weights, LOADERS["the headers alone"]):
        with raises("model.tensor-mismatch", ModelError):
            load(tmp_path)


def test_trainers_and_references_by_name_are_whole(saved: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(saved, tmp_path / "whole")
    rewritten(saved, without("layers.1.mlp.down_proj"))
    missing = ["model.layers.1.mlp.down_proj.weight"]
    for trainer in (SFTTrainer, DPOTrainer, RewardTrainer):
        args = trainer.config_class(output_dir=str(tmp_path / "out"), use_cpu=True)
        with raises("model.tensor-mismatch", ModelError, missing=missing):
            trainer(str(saved), args=args)
    args = DPOTrainer.config_class(output_dir=str(tmp_path / "out"), use_cpu=True)
    with raises("model.tensor-mismatch", ModelError, missing=missing):
        DPOTrainer(str(whole), ref_model=str(saved), args=args)


def test_a_language_model_does_not_score(saved: Path) -> None:
    with raises("model.tensor-mismatch", ModelError, missing=["score.weight"]):
        RewardModel(saved)


def test_a_classifier_may_keep_its_language_head(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "lm")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=1)
    classifier.save_pretrained(tmp_path / "rm")
    rewritten(tmp_path / "rm", with_more(lm_head__weight=torch.ones(61, 32)))
    assert load_weights(tmp_path / "rm", reward=True).config.num_labels == 1
    rewritten(tmp_path / "rm", without("score"))
    with raises("model.tensor-mismatch", ModelError, missing=["score.weight"]):
        load_weights(tmp_path / "rm", reward=True)


def test_an_adapter_next_to_a_model_is_not_loaded_with_it(saved: Path) -> None:
    (saved / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for load in (load_weights, LOADERS["a name"]):
        with raises("model.adapter-in-directory", ModelError):
            load(saved)


# --- code and pickles ---


def foreign(folder: Path, mark: Path) -> None:
    """Turn a model and its tokenizer into ones with custom code."""
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig): model_type = 'evil'\nclass M(LlamaForCausalLM): config_class = C\n"
        "class T: pass\n"
    )
    for name, more in {
        "config.json": {
            "model_type": "evil",
            "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "evil.T"]},
        },
    }.items():  # fmt: skip
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, **more}))


def test_nobody_is_asked_whether_code_may_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(saved, tmp_path / "ran")
    args = SFTTrainer.config_class(output_dir=str(tmp_path / "out"), use_cpu=True)
    loads: list[Callable[[], Any]] = [
        lambda: SFTTrainer(str(saved), args=args),
        lambda: SFTTrainer(str(saved), args=args, processing_class=character_tokenizer()),
        lambda: load_weights(saved),
    ]
    for load in loads:
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
        with raises("model.needs-remote-code", ModelError):
            load()
        assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    with pytest.raises(ModelError, match="custom code"):
        RewardModel(saved)
    assert not (tmp_path / "ran").exists()


def test_attention_code_from_the_hub_is_refused(saved: Path) -> None:
    settings = json.loads((saved / "config.json").read_text())
    settings["attn_implementation"] = "somebody/attention"
    (saved / "config.json").write_text(json.dumps(settings))
    for load in (load_weights, LOADERS["a name"], LOADERS["a recipe's model"]):
        with raises("model.hub-kernel", ModelError) as error:
            load(saved)
        assert "somebody/attention" in error.value.what


def test_pickled_weights_are_read_nowhere(saved: Path, tmp_path: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    args = DPOTrainer.config_class(output_dir=str(tmp_path / "out"), use_cpu=True)
    for load in (
        load_weights,
        LOADERS["a name"],
        lambda p: DPOTrainer(
            make_model(vocab_size=100),
            ref_model=str(p),
            args=args,
            processing_class=character_tokenizer(),
        ),
    ):
        with raises("model.cannot-load", ModelError):
            load(saved)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        RewardModel(saved)


ASKING = {"from_pretrained", "load_dataset", "from_config", "HFLM", "TaskManager"}


def calls() -> list[tuple[Path, ast.Call, str]]:
    found = []
    for path in sorted(Path(rpo_trainer.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in ASKING:
                    found.append((path, node, name))
    return found


def test_every_call_that_could_run_foreign_code_says_whether_it_may() -> None:
    """transformers prompts on stdin by default; these calls cannot: they read JSON, or no files."""
    harmless = {
        "GenerationConfig", "PeftConfig", "PeftModel", "TaskManager",
        "kind",  # loading without a source, from headers
    }  # fmt: skip
    seen = 0
    for path, node, name in calls():
        owner = getattr(getattr(node.func, "value", None), "id", name)
        if owner in harmless:
            continue
        given = {keyword.arg for keyword in node.keywords}
        assert "trust_remote_code" in given, f"{path.name}:{node.lineno}: {name}"
        seen += 1
    assert seen >= 6


def test_models_are_loaded_in_one_module() -> None:
    elsewhere = {
        path.name
        for path, node, name in calls()
        if name == "from_pretrained"
        and getattr(getattr(node.func, "value", None), "id", "")
        not in ("GenerationConfig", "PeftConfig", "PeftModel")
    }
    assert elsewhere == {"from_pretrained.py"}
