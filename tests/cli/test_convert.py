"""`rpo-trainer convert`: its recipe passes `check`; existing files are not replaced by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.recipe.yaml_document import dump
from tests.cli.helpers import call

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
GENERATION = "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and data in the layouts of other tools."""
    from rpo_trainer.data.quickstart import character_tokenizer
    from tests.rewards.policies import llama

    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE + GENERATION
    tokenizer.save_pretrained(folder / "model")
    llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    pairs = [
        {"instruction": f"Say {i}", "input": "", "chosen": f"It is {i}.", "rejected": f"No {i}."}
        for i in range(16)
    ]
    (folder / "data" / "pairs.json").write_text(json.dumps(pairs))
    info = {"pairs": {"file_name": "pairs.json", "ranking": True}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


_LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "./model", "stage": "dpo", "finetuning_type": "lora", "lora_rank": 2,
    "lora_target": "all", "dataset": "pairs", "template": "default", "cutoff_len": 200,
    "per_device_train_batch_size": 2, "learning_rate": 1e-5, "warmup_ratio": 0.1,
    "dataloader_num_workers": 0, "save_steps": 50, "output_dir": "runs/lf", "val_size": 0.25,
    "eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 1,
}  # fmt: skip
_AXOLOTL: dict[str, Any] = {
    "base_model": "./model", "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    "sequence_len": 200, "adapter": "lora", "lora_r": 2, "lora_alpha": 4,
    "lora_target_linear": True, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
    "num_epochs": 1, "learning_rate": 1e-4, "optimizer": "adamw_torch", "bf16": "auto",
    "output_dir": "runs/axolotl", "flash_attention": True, "warmup_ratio": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("values", [_LLAMA_FACTORY, _AXOLOTL], ids=["llama-factory", "axolotl"])
def test_a_converted_recipe_passes_check(
    values: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lf" if values is _LLAMA_FACTORY else "axolotl"
    config = folder / f"{name}.yaml"
    config.write_text(dump({**values, "mystery": 1}))
    assert call("check", config) == 2
    assert "recipe.foreign-file" in capsys.readouterr().err
    assert call("convert", config, "-o", folder / f"{name}.recipe.yaml") == 0
    assert "mystery" in capsys.readouterr().out
    assert call("check", folder / f"{name}.recipe.yaml") == 0


def test_an_existing_recipe_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(dump(_AXOLOTL))
    assert call("convert", config) == 0
    written = tmp_path / "a.recipe.yaml"
    written.write_text("mine")
    assert call("convert", config) == 2
    assert "option.path-exists" in capsys.readouterr().err
    assert written.read_text() == "mine"
    assert call("convert", config, "--overwrite") == 0
    assert written.read_text() != "mine"


def test_a_method_without_a_counterpart_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(dump({**_AXOLOTL, "rl": "kto"}))
    assert call("convert", config) == 2
    assert "convert.unsupported-method" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml"]
