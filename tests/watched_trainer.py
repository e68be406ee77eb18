"""A small transformers Trainer that records the results of its private methods."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Squares(nn.Module):
    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, return_loss: bool = True) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).square().mean()}


class Watched(Trainer):
    """Record the arguments and results of the private methods that we override."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: dict[str, list[Any]] = defaultdict(list)
        for name in OVERRIDDEN:
            setattr(self, name, functools.partial(self.noted, name, getattr(self, name)))

    def noted(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        self.calls[name].append(result)
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.calls["save_model"].append(_internal_call)
        super().save_model(output_dir, _internal_call)


OVERRIDDEN = {
    "_determine_best_metric": ("metrics", "trial"),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_get_output_dir": ("trial",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_scaler": ("checkpoint",),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_prepare_inputs": ("inputs",),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_track_num_input_tokens": ("inputs",),
}


@functools.cache
def worked() -> Watched:
    """A trainer that has taken a step, evaluated, saved, loaded and taken another step."""
    rows = [{"x": torch.ones(1)} for _ in range(4)]
    with TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1,
            "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss",
            "include_num_input_tokens_seen": "all",
        }  # fmt: skip

        def trainer(steps: int) -> Watched:
            arguments = TrainingArguments(max_steps=steps, **settings)
            return Watched(Squares(), arguments, train_dataset=rows, eval_dataset=rows)

        trainer(1).train()
        watched = trainer(2)
        watched.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-1"))
        return watched
