"""Gradient checkpointing with adapters: frozen embeddings get no gradient if nothing needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from rpo_trainer import SFTConfig, SFTTrainer
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.trainers.examples import Examples
from tests.families import tiny_model

ROWS = [
    {"id": str(n), "prompt_ids": [6, 7, 8 + n], "response_ids": [[9, 2]], "response_mask": [[1, 1]]}
    for n in range(4)
]


class Seen(TrainerCallback):
    """Whether the embeddings' output requires gradients, and how far the adapter's gradients differ."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        embedding = transformers_model(model).get_input_embeddings()
        embedding.register_forward_hook(lambda *a: self.asked.append(a[2].requires_grad))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        trained = {
            n: p for n, p in model.named_parameters() if p.requires_grad and "visual" not in n
        }
        assert trained and all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("family", ["llama", "git"])
def test_input_gradients_only_where_checkpointing_needs_them(
    family: str, reentrant: bool | None, tmp_path: Path
) -> None:
    if family == "git" and reentrant:
        pytest.skip("the class changes its embeddings in place, and is not made for it")
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        gradient_checkpointing=True, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing_kwargs=None if reentrant is None else {"use_reentrant": reentrant},
    )  # fmt: skip
    seen = Seen()
    trainer = SFTTrainer(
        tiny_model(family), args=args, train_dataset=Examples(ROWS), callbacks=[seen],
        processing_class=character_tokenizer(), peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    assert set(seen.asked) == {bool(reentrant)}
