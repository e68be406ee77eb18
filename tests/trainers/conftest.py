"""Trainers of tiny models on generated rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.trainers import DPOTrainer, RPOTrainer, SFTTrainer
from tests.small_models import make_model

TRAINERS = {"sft": SFTTrainer, "dpo": DPOTrainer, "rpo": RPOTrainer}


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small matrices are slower with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return character_tokenizer()


@pytest.fixture(scope="session")
def start() -> Any:
    """The initial policy; tests train copies."""
    return make_model(dtype=torch.float64)


@pytest.fixture(scope="session")
def other() -> Any:
    """A reference other than the policy, so that no gap is 0."""
    return make_model(dtype=torch.float64, seed=1)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Any]:
    """`make_config("dpo", learning_rate=...)`: plain SGD, without clipping, saving or logging."""

    def make(kind: str, **settings: Any) -> Any:
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "save_strategy": "no",
            "logging_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        return TRAINERS[kind].config_class(**{**defaults, **settings})

    return make


@pytest.fixture
def make_trainer(make_config: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """`make_trainer("dpo", model, rows, ref_model=..., learning_rate=...)`."""

    def make(
        kind: str,
        model: Any,
        rows: Any,
        *,
        ref_model: Any = None,
        eval_rows: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        processing_class: Any = None,
        **settings: Any,
    ) -> Any:
        trainer_class = TRAINERS[kind]
        extra = {} if kind == "sft" else {"ref_model": ref_model}
        return trainer_class(
            model=model,
            args=make_config(kind, **settings),
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=processing_class or tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
            **extra,
        )

    return make
