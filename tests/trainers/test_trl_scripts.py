"""Scripts written for TRL run after their import is changed, or stop with what to remove.

`trl_scripts/` has them as they are for TRL. Local paths replace the names of models and data sets.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rpo_trainer.data import set_chat_template
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import RecipeError
from tests.raising import raises

SCRIPTS = Path(__file__).parent / "trl_scripts"
OURS = ("SFTTrainer", "SFTConfig", "DPOTrainer", "DPOConfig")
Run = Callable[..., dict[str, Any]]


def after_the_import(source: str) -> str:
    """Return the script with our trainers and configs in place of TRL's; its other imports stay TRL's."""
    found = re.search(r"^from trl import (.+)$", source, flags=re.MULTILINE)
    assert found
    names = [name.strip() for name in found[1].split(",")]
    lines = [f"from rpo_trainer import {', '.join(name for name in names if name in OURS)}"]
    if rest := [name for name in names if name not in OURS]:
        lines.append(f"from trl import {', '.join(rest)}")
    return source.replace(found[0], "\n".join(lines))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Local paths by the names in the scripts."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = set_chat_template(character_tokenizer(), "plain")
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    questions = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(16)]
    data = {
        "questions": questions,
        "pairs": [
            {"prompt": row["question"], "chosen": " " + row["answer"], "rejected": " no idea"}
            for row in questions
        ],
        "conversations": [
            {
                "messages": [
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"]},
                ]
            }
            for row in questions
        ],
    }
    for name, rows in data.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"org/base-model": str(folder / "model"), **{f"org/{n}": str(folder / n) for n in data}}


@pytest.fixture
def run(hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a script of `trl_scripts` in a separate directory; return its names."""

    def start(name: str) -> dict[str, Any]:
        source = after_the_import((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
        for remote, local in hub.items():
            source = source.replace(f'"{remote}"', repr(local))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(source, f"{name}.py", "exec"), names)
        return names

    return start


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_lora_on_conversations(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run("sft_lora_chat")["trainer"]
    assert trainer.state.global_step == 3 and len(losses(trainer)) == 3
    assert (tmp_path / "sft-lora" / "adapter_model.safetensors").is_file()
    assert any("eval_loss" in line for line in trainer.state.log_history)


def test_a_formatting_function_and_a_model_by_name(run: Run) -> None:
    names = run("sft_formatting")
    trainer, tokenizer = names["trainer"], names["tokenizer"]
    row = trainer.train_dataset[0]
    text = tokenizer.decode([*row["prompt_ids"], *row["response_ids"][0]])
    # The end token that the function writes is the token, and is not added again.
    assert "### Question: 0 + 1?" in text and text.count(tokenizer.eos_token) == 1
    assert row["response_ids"][0][-1] == tokenizer.eos_token_id
    assert trainer.args.max_length == 200 and trainer.args.warmup_steps == 0.1
    assert trainer.model.config._attn_implementation is not None
    assert len(losses(trainer)) == 3


def test_tokenized_rows_train_as_they_are(run: Run) -> None:
    names = run("sft_tokenized")
    trainer, rows = names["trainer"], names["rows"]
    assert len(trainer.train_dataset) == len(rows)
    for given, made in zip(rows, trainer.train_dataset, strict=True):
        assert [*made["prompt_ids"], *made["response_ids"][0]] == given["input_ids"]
        masked = given["labels"].count(-100)
        assert len(made["prompt_ids"]) == masked and set(made["response_mask"][0]) == {1}


def test_dpo_with_a_reference_model(run: Run) -> None:
    trainer = run("dpo_pairs")["trainer"]
    assert trainer.args.loss_type == "dpo" and trainer.args.truncation == "truncate"
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert any("eval_rewards/margins" in line for line in trainer.state.log_history)


def test_dpo_from_a_command_line(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    trainer = run("dpo_cli")["trainer"]
    assert trainer.args.precompute_ref_log_probs is True
    assert (tmp_path / "dpo-cli" / "adapter_model.safetensors").is_file()


def test_what_would_change_the_result_stops_with_one_line(run: Run) -> None:
    with raises(
        "training.unknown-argument", RecipeError, arguments=["max_prompt_length"]
    ) as caught:
        run("dpo_older")
    assert (caught.value.fix or "").startswith("max_prompt_length: remove it")


def test_the_scripts_data_is_as_they_say(hub: dict[str, str]) -> None:
    assert len(datasets.load_dataset(hub["org/pairs"], split="train")) == 16


@pytest.mark.parametrize("name", ["ModelConfig", "TrlParser", "DataCollatorForCompletionOnlyLM"])
def test_other_names_of_trl_are_answered(name: str) -> None:
    with pytest.raises(ImportError, match=name):
        exec(f"from rpo_trainer import {name}", {})
    with pytest.raises(ImportError, match="cannot import"):
        exec("from rpo_trainer import Nowhere", {})
