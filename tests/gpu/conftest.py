"""Trainers on the first GPU, which every test of this directory requires."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.trainers import DPOTrainer, RPOTrainer, SFTTrainer
from tests.small_models import make_model

TRAINERS = {"sft": SFTTrainer, "dpo": DPOTrainer, "rpo": RPOTrainer}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this directory if no GPU is visible."""
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return character_tokenizer()


@pytest.fixture(scope="session")
def start() -> Any:
    """The initial policy: grouped keys, heads of 16, so that the variable-length kernel supports it."""
    return make_model(hidden_size=64, max_position_embeddings=512)


@pytest.fixture
def make_trainer(tokenizer: Any, start: Any, tmp_path: Path) -> Callable[..., Any]:
    """`make_trainer("rpo", rows, bf16=True, ...)`: AdamW, no logging, no saving."""

    def make(
        kind: str, rows: Any, *, model: Any = None, callbacks: Any = None, **settings: Any
    ) -> Any:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2,
            "global_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
            "max_steps": 4, "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
            "disable_tqdm": True,
        }  # fmt: skip
        return TRAINERS[kind](
            model=copy.deepcopy(model if model is not None else start),
            args=TRAINERS[kind].config_class(**{**defaults, **settings}),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    return make
