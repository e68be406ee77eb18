"""A step with tensors on a GPU, tested without one: fake tensors raise the same error for two devices in one
operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSequenceClassification

from rpo_trainer.rewards.drawing import Draw
from rpo_trainer.step import attention_varlen
from rpo_trainer.step.batch import ModelInputs, PackedBatch
from rpo_trainer.step.forward import install, response_scores
from rpo_trainer.trainers import DPOConfig, DPOTrainer, RPOConfig, RPOTrainer
from rpo_trainer.trainers.examples import PackingCollator
from rpo_trainer.trainers.guards import StepGuard
from rpo_trainer.trainers.metrics import Metrics
from rpo_trainer.trainers.step_zero import StepZero
from tests.small_models import make_model

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs a build of torch for CUDA, but no GPU"
)
GPU = torch.device("cuda", 0)
EXAMPLES = [
    {
        "prompt_ids": list(range(3, 3 + prompt)),
        "response_ids": [list(range(5, 5 + n)) for n in lengths],
        "response_mask": [[1] * n for n in lengths],
        "rewards": [1.0, 0.0],
        "reference_logps": [-3.0, -2.0],
    }
    for prompt, lengths in ((4, (3, 2)), (2, (2, 5)))
]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`with on_gpu() as move`: `move(value)` returns fake tensors on the GPU."""
    monkeypatch.setattr(attention_varlen, "_has_kernel", lambda device: device.type == "cuda")
    made: dict[int, Any] = {}

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in made:  # a tied weight stays one tensor
                fake: Any = torch.empty(value.shape, dtype=value.dtype, device=GPU)
                made[id(value)] = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake
            return made[id(value)]
        if isinstance(value, PackedBatch | ModelInputs):
            return value.map(move)
        if isinstance(value, nn.Module):
            for module in value.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        tensors[name] = None if tensor is None else move(tensor)
            return value
        return value

    @contextmanager
    def entered() -> Iterator[Callable[[Any], Any]]:
        with FakeTensorMode():
            yield move

    return entered


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded", "single"])
@pytest.mark.parametrize(
    ("trainer", "config", "settings"),
    [
        (DPOTrainer, DPOConfig, {}),
        (RPOTrainer, RPOConfig, {}),
        (RPOTrainer, RPOConfig, {"loss_type": "rpo_sqloo", "average_logps": True}),
    ],
)
def test_a_step_of_preferences(trainer, config, settings, layout, half, tmp_path, on_gpu):
    """Forward, losses, metrics and the step-0 check."""
    model = make_model("mistral", dtype=torch.bfloat16 if half else torch.float32)
    install(model, layout=layout)
    batch = PackingCollator(layout, 0)(EXAMPLES)
    self = object.__new__(trainer)
    self.args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    self.router, self.step_guard = None, StepGuard(0)
    self.metrics = Metrics()
    with on_gpu() as move:
        self.model, batch = move(model).train(), move(batch)
        self._step_zero = StepZero(
            self.model, self.args, layout=layout, has_ref_model=False,
            use_rewards=self.needs_rewards, reduce=lambda sums: sums, autocast=nullcontext,
        )  # fmt: skip
        loss = self.compute_loss(self.model, batch, num_items_in_batch=batch.counts)
        self.compute_loss(self.model, batch, return_outputs=True)
        answers = [loss, self._step_zero.sums, *self.metrics.training._sums.values()]
        assert {x.device for x in answers} == {GPU}


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_scores_of_a_classifier(layout, on_gpu):
    config = make_model("llama").config
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    install(model, layout=layout)
    batch = PackingCollator(layout, 0)(EXAMPLES)
    with on_gpu() as move:
        assert response_scores(move(model), move(batch.model_inputs)).device == GPU


def test_a_token_is_drawn(on_gpu):
    draw = Draw(np.zeros((4, 5)), width=3)
    with on_gpu() as move:
        draw.numbers = move(draw.numbers)
        ids, scores = torch.zeros(4, 3, device=GPU), torch.zeros(4, 50, device=GPU)
        assert draw(ids, scores.bfloat16()).device == GPU


def test_two_devices_in_one_operation_are_noticed(on_gpu):
    with on_gpu(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=GPU).index_select(0, torch.tensor([0]))
