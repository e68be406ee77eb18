"""SmolLM2-135M-Instruct trained by our trainers and by TRL: its weights, tokenizer and template, float32.

The template adds a system message to rows without one, and the padding token is the end token.

    RPO_TRAINER_SMOLLM2=FOLDER python -m pytest tests/bench/test_real_model.py
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo_trainer.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from tests.bench.settings import SETTINGS

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

FOLDER = os.environ.get("RPO_TRAINER_SMOLLM2", "")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not FOLDER, reason="RPO_TRAINER_SMOLLM2 does not name a folder with SmolLM2-135M-Instruct"
    ),
]

BATCH, END = 4, 2
TEXT = """The old mill stands by a small river, and every morning two boats leave it with 12 sacks of
flour for bakers who pay late! Why? Because, they say, bread is cheap.\n\n- first\n- second: 7 %"""
COMMON = {**SETTINGS, "bf16": False, "gradient_checkpointing": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # each train() collects garbage, which would scan all imported libraries
    yield
    torch.set_num_threads(before)


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


def say(rng: Random, low: int, high: int) -> str:
    return " ".join(rng.choices(TEXT.split(" "), k=rng.randint(low, high))).strip()


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pairs(count: int) -> list[dict[str, Any]]:
    """Every third row has its own system message, every fourth has three turns."""
    rng = Random(0)
    rows = []
    for i in range(count):
        prompt = [turn("user", say(rng, 4, 12))]
        if i % 4 == 1:
            prompt += [turn("assistant", say(rng, 2, 8)), turn("user", say(rng, 2, 8))]
        if i % 3 == 2:
            prompt = [turn("system", say(rng, 3, 6)), *prompt]
        chosen, rejected = ([turn("assistant", say(rng, 3, 14))] for _ in range(2))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def lines(trainer: Any) -> list[dict[str, float]]:
    found = [line for line in trainer.state.log_history if "loss" in line]
    assert len(found) == trainer.args.max_steps
    return found


def worst(ours: Any, theirs: Any, names: list[str]) -> dict[str, float]:
    both = list(zip(lines(ours), lines(theirs), strict=True))
    return {name: max(abs(a[name] - b[name]) for a, b in both) for name in names}


def test_dpo_20_steps(tmp_path: Any, capsys: Any) -> None:
    settings = {**COMMON, "max_steps": 20, "learning_rate": 1e-5, "beta": 0.1}
    ours = DPOTrainer(
        model(),
        args=DPOConfig(
            output_dir=str(tmp_path / "ours"), shuffle=False, global_batch_size=BATCH,
            per_device_train_batch_size=2, **settings,
        ),
        train_dataset=pairs(20 * BATCH),
        processing_class=tokenizer(),
    )  # fmt: skip
    theirs = trl.DPOTrainer(
        model(),
        ref_model=model(),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential", **settings,
        ),
        train_dataset=datasets.Dataset.from_list(pairs(20 * BATCH)),
        processing_class=tokenizer(),
    )  # fmt: skip
    theirs.train_dataset = theirs.train_dataset.map(without_newline)
    for row, other in zip(ours.train_dataset.view.dataset, theirs.train_dataset, strict=True):
        assert row["prompt_ids"] == other["prompt_ids"]
        assert row["response_ids"] == [other["chosen_ids"], other["rejected_ids"]]
    ours.train()
    theirs.train()

    found = worst(
        ours, theirs,
        ["loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
         "logps/rejected", "grad_norm", "learning_rate"],
    )  # fmt: skip
    with capsys.disabled():
        print(f"\ndpo: largest differences {found}")
    assert found["loss"] < 1e-4 and found["rewards/margins"] < 1e-4
    assert found["logps/chosen"] < 1e-3 and found["logps/rejected"] < 1e-3
    margins = [line["rewards/margins"] for line in lines(ours)]
    assert all(map(math.isfinite, margins)) and max(margins) - min(margins) > 0.05


def without_newline(row: dict[str, Any]) -> dict[str, list[int]]:
    """TRL counts what the template writes after the end token; our responses end with that token."""
    cut = {name: row[name][:-1] for name in ("chosen_ids", "rejected_ids")}
    assert all(ids[-1] == END for ids in cut.values())
    return cut


def test_sft_10_steps_on_the_assistants_words(tmp_path: Any, capsys: Any) -> None:
    """TRL has no training variant of this template: it gets one in which the assistant's part is marked."""
    settings = {**COMMON, "max_steps": 10, "learning_rate": 2e-5}
    rows = [{"messages": row["prompt"] + row["chosen"]} for row in pairs(10 * BATCH)]
    marked = tokenizer()
    said = "message['content'] + '<|im_end|>'"
    assert said in marked.chat_template
    marked.chat_template = marked.chat_template.replace(
        f"{{{{'<|im_start|>' + message['role'] + '\n' + {said} + '\n'}}}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
        f"{{% generation %}}{{{{{said}}}}}{{% endgeneration %}}{{% else %}}{{{{{said}}}}}{{% endif %}}"
        "{{'\n'}}",
    )
    ours = SFTTrainer(
        model(),
        args=SFTConfig(
            output_dir=str(tmp_path / "ours"), shuffle=False, global_batch_size=BATCH,
            per_device_train_batch_size=2, **settings,
        ),
        train_dataset=rows,
        processing_class=tokenizer(),
    )  # fmt: skip
    theirs = trl.SFTTrainer(
        model(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential", assistant_only_loss=True, **settings,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=marked,
    )  # fmt: skip
    for row, other in zip(ours.train_dataset.view.dataset, theirs.train_dataset, strict=True):
        ids = row["prompt_ids"] + row["response_ids"][0]
        mask = [0] * len(row["prompt_ids"]) + list(row["response_mask"][0])
        labels = [i if kept else -100 for i, kept in zip(ids, mask, strict=True)]
        assert labels == other["labels"][: len(labels)]
        assert all(label == -100 for label in other["labels"][len(labels) :])
    ours.train()
    theirs.train()

    found = worst(ours, theirs, ["loss", "grad_norm", "learning_rate"])
    with capsys.disabled():
        print(f"\nsft: largest differences {found}")
    assert found["loss"] < 1e-4
    losses = [line["loss"] for line in lines(ours)]
    assert max(losses) - min(losses) > 0.05
