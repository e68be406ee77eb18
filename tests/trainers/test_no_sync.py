"""The host waits for the device once in an optimizer step, and never in a micro-batch.

On a CPU there are no waits, but the same operations are dispatched as on a GPU: those that return a tensor's
content to Python, or whose result has a shape that depends on content, are counted.
"""

from __future__ import annotations

import copy
import itertools
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainers.plain import make_rows

_RUNS = itertools.count()

# Operators that return a Python number, or a shape that depends on content.
_WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount",
    "repeat_interleave",
}  # fmt: skip
# On a CPU these read memory, and dispatch no operator.
_READING = {"tolist", "numpy", "cpu", "__array__", "__dlpack__"}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = name in _WAITING and func.name() not in (
            "aten::repeat_interleave.self_int",  # the shape is known
        )
        if name in _BY_INDEX:  # a mask: the number of its True is the shape
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if waits:
            self.seen[_where(name)] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # A literal "cpu"; here also the trainer's own device, which is a torch.device.
        to_cpu = name == "to" and any(a == "cpu" for a in (*args[1:], *(kwargs or {}).values()))
        if name in _READING or to_cpu:
            self.seen[_where(name)] += 1
        return func(*args, **(kwargs or {}))


def _where(name: str) -> str:
    """The operator, and the innermost line that is neither in torch nor in this file."""
    frames = [
        f for f in traceback.extract_stack()
        if "/torch/" not in f.filename and f.filename != __file__
    ]  # fmt: skip
    return f"{name} at {'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}"


def waits(function: Any) -> Counter[str]:
    """Return the synchronizations that `function()` causes, by place."""
    seen: Counter[str] = Counter()
    with _Operators(seen), _Reads(seen):
        function()
    return seen


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool(x.any()), lambda x: x.tolist(),
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu"), lambda x: x.masked_select(x > 0), lambda x: x.numpy(),
        lambda x: x.unique(), lambda x: x.repeat_interleave((x > 0).long()),
        lambda x: x.clone().__setitem__(x > 0, 0.0), lambda x: torch.equal(x, x),
        lambda x: x if x[0] > 0 else -x, lambda x: torch.where(x > 0),
    ],
)  # fmt: skip
def test_whatever_waits_is_counted(use):
    assert sum(waits(lambda: use(torch.tensor([1.0, -1.0]))).values()) == 1


def test_what_does_not_wait_is_not_counted():
    def function() -> None:
        x = torch.ones(4, 3, requires_grad=True)
        y = x.index_select(0, torch.tensor([0, 2]))[torch.tensor([1])].repeat_interleave(2, dim=1)
        y.double().to(torch.float32).sum().backward()
        torch.stack([y.isfinite().sum(), y.detach().sum().clamp_min(1)])

    assert not waits(function)


@pytest.fixture
def waits_of(make_trainer: Any, start: Any, tmp_path: Path) -> Any:
    """`waits_of("rpo", steps, ...)`: the synchronizations of so many optimizer steps, without logging."""

    def run(kind: str, steps: int, **settings: Any) -> Counter[str]:
        ks = {"sft": (1,) * 32, "dpo": (2,) * 32, "rpo": (2, 3, 4, 2) * 8}[kind]
        if kind != "sft":
            # The reference's log-probs are read by the host: all of them in every run.
            settings["reference_cache_dir"] = str(tmp_path / f"cache-{next(_RUNS)}")
        trainer = make_trainer(
            kind, copy.deepcopy(start).float(), make_rows(0, ks, rewards=kind == "rpo"),
            # Fused: plain AdamW reads its own counters, which are in host memory.
            **{
                "max_steps": steps, "global_batch_size": 4, "optim": "adamw_torch_fused",
                "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", **settings,
            },
        )  # fmt: skip
        return waits(trainer.train)

    return run


GUARD = "tolist at trainers/guards.py"


def files(seen: Counter[str]) -> dict[str, int]:
    """Return the places without line numbers."""
    total: Counter[str] = Counter()
    for place, number in seen.items():
        total[place.rpartition(":")[0]] += number
    return dict(total)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", {}),
        ("dpo", {"sft_loss_weight": 0.1, "sft_reduction": "token_mean"}),
        ("rpo", {"sft_loss_weight": 0.1, "average_logps": True}),
        ("rpo", {"layout": "packed"}),
        ("rpo", {"gradient_checkpointing": True}),
        ("rpo", {"bf16": True}),
        ("rpo", {"max_grad_norm": 0.0}),
    ],
)
def test_a_step_waits_once_and_a_micro_batch_never(kind, settings, waits_of):
    short = waits_of(kind, 2, per_device_train_batch_size=2, **settings)
    long = waits_of(kind, 5, per_device_train_batch_size=2, **settings)
    assert files(long - short) == {GUARD: 3}
    assert waits_of(kind, 2, per_device_train_batch_size=1, **settings) == short


def test_a_step_of_a_token_budget_waits_once(waits_of):
    short, long = (waits_of("rpo", steps, micro_batch_tokens=100) for steps in (2, 5))
    assert files(long - short) == {GUARD: 3}
    assert waits_of("rpo", 2, micro_batch_tokens=30) == short


def test_padded_rows_wait_for_transformers_look_at_their_mask(waits_of):
    """Accepted only in this layout, the last resort: some synchronizations in each forward."""
    short, long = (waits_of("rpo", steps, layout="padded") for steps in (2, 5))
    more = files(long - short)
    assert more.pop(GUARD) == 3
    assert {*more} == {"_local_scalar_dense at transformers/masking_utils.py"}
