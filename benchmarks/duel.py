"""Trainers against each other: the same work in turn in one process, or each one's peak in its own."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import record
import torch
from common import DEVICE, make_model, make_tokenizer, matmul_flops, parser, quiet, wait
from transformers import TrainerCallback

from rpo_trainer.runtime.memory import peak_memory

# What a trainer is built from: arguments, model, tokenizer, callbacks → trainer.
Builder = Callable[[argparse.Namespace, Any, Any, list[TrainerCallback]], Any]


@dataclass
class Work:
    """One optimizer step, the same for all: how much of what, and its model FLOPs."""

    amount: float
    unit: str
    flops: float


def duel_parser(description: str | None, peers: list[str]) -> argparse.ArgumentParser:
    """The options of a comparison of trainers."""
    made = parser(description)
    made.add_argument("--batch", type=int, default=4, help="rows of one optimizer step")
    made.add_argument(
        "--micro", type=int, default=4, help="rows of one forward, accumulated to --batch"
    )
    made.add_argument("--steps", type=int, default=3, help="steps of one round, warm-up included")
    made.add_argument(
        "--peers", nargs="*", default=peers, choices=peers, help="none: ours alone, without TRL"
    )
    made.add_argument("--memory", action="store_true", help="peak memory, one process each")
    made.add_argument("--only", help=argparse.SUPPRESS)
    return made


def settings(args: argparse.Namespace, *, micro: int, accumulation: int) -> dict[str, Any]:
    """What every trainer is told."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="bench-"),
        "max_steps": args.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": DEVICE == "cpu",
        "bf16": False,  # no autocast: weights, gradients and optimizer state are of --dtype in all
        "gradient_checkpointing": False,
    }


def accumulation_of(args: argparse.Namespace) -> int:
    """Forwards of one optimizer step."""
    if args.batch % args.micro:
        raise SystemExit(f"--batch {args.batch} does not divide by --micro {args.micro}")
    return args.batch // args.micro


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, device work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self._start)


def run(args: argparse.Namespace, builders: dict[str, Builder], work: Work) -> None:
    """What the options ask for; the first builder is ours, the others are `--peers`."""
    first, *_ = builders
    names = [first, *(name for name in builders if name in args.peers)]
    if args.only:
        _one(args, builders[args.only])
    elif args.memory:
        _memory(args, names)
    else:
        _compare(args, {name: builders[name] for name in names}, work)


def build(args: argparse.Namespace, builder: Builder) -> tuple[Any, StepTimes]:
    """A trainer with a model of its own."""
    times = StepTimes()
    tokenizer = make_tokenizer(args.vocabulary)
    model = make_model(args.size, args.vocabulary, dtype=args.dtype)
    with quiet():
        return builder(args, model, tokenizer, [times]), times


def alternate(
    trainers: dict[str, tuple[Any, StepTimes]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Trains each in turn, round after round: seconds of the steps, and the first round's mean loss.

    The first step of each training is warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    losses: dict[str, float] = {}
    for _ in range(rounds):
        for name, (trainer, times) in trainers.items():
            times.seconds.clear()
            with quiet():
                done = trainer.train()
            losses.setdefault(name, float(done.training_loss))
            seconds[name] += times.seconds[1:]
    return seconds, losses


def _compare(args: argparse.Namespace, builders: dict[str, Builder], work: Work) -> None:
    if args.steps < 2:
        raise SystemExit("--steps must be 2 or more: the first is warm-up")
    speed = matmul_flops(args.dtype)
    trainers = {name: build(args, builder) for name, builder in builders.items()}
    seconds, losses = alternate(trainers, args.rounds)
    speed = max(speed, matmul_flops(args.dtype))
    ours, *peers = builders
    middles = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: record.spread(seconds[ours], seconds[name]) for name in peers}
    for name, middle in middles.items():
        line = (
            f"{name:12} {middle:8.3f} s a step  {work.amount / middle:10.2f} {work.unit} a second"
        )
        if name in ratios:
            line += "  {:.2f} × ours ({:.2f} to {:.2f})".format(*ratios[name])
        print(f"{line}  loss {losses[name]:.4f}")
    utilization = work.flops / middles[ours] / speed
    if peers:
        fastest = min(peers, key=middles.__getitem__)
        middle, low, high = ratios[fastest]
        steps = len(seconds[ours])
        print(f"ratio {middle:.2f} to {fastest} (from {low:.2f} to {high:.2f} over {steps} steps)")
    print(
        f"model FLOPs utilization, ours: {utilization:.0%} of a matrix product's "
        f"{speed / 1e12:.3g} TFLOP/s"
    )
    record.append(
        args,
        unit=work.unit,
        seconds=middles,
        rate={name: work.amount / middle for name, middle in middles.items()},
        ratios={name: dict(zip(_SPREAD, values, strict=True)) for name, values in ratios.items()},
        losses=losses,
        utilization=utilization,
        matmul_flops=speed,
    )


_SPREAD = ("median", "least", "largest")


def _memory(args: argparse.Namespace, names: list[str]) -> None:
    found: dict[str, dict[str, int]] = {}
    for name in names:
        found[name] = measure(["--only", name, *sys.argv[1:]], sys.argv[0])
        parts = "  ".join(f"{k} {record.mib(v)}" for k, v in found[name].items() if k != "peak")
        print(f"{name:12} {record.mib(found[name]['peak'])} peak  ({parts})")
    states = {name: figures["optimizer"] for name, figures in found.items()}
    if len(set(states.values())) > 1:
        raise SystemExit(f"the optimizer states differ, so the peaks do not compare: {states}")
    ours, *peers = names
    ratios = {name: found[ours]["peak"] / found[name]["peak"] for name in peers}
    for name, ratio in ratios.items():
        print(f"ratio {ratio:.2f} to {name}")
    record.append(args, memory=found, memory_ratios=ratios)


def measure(options: list[str], script: str) -> dict[str, int]:
    """What `one` of these options finds, in a process of its own."""
    command = [sys.executable, script, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _one(args: argparse.Namespace, builder: Builder) -> None:
    """Trains one and prints its peak and what that holds, in bytes, as JSON.

    `used` is the peak without what the process held before it had a model, libraries on a CPU; `rest` is what
    is left of that without weights, gradients and optimizer state: activations, tiles, temporaries.
    """
    make_tokenizer(args.vocabulary)
    _load_libraries(args, builder)
    before = record.memory_now()
    trainer, _ = build(args, builder)
    with quiet():
        trainer.train()
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    found = {
        "peak": peak_memory(),
        "weights": weights,
        "gradients": weights,  # all are trained, in the dtype of the weights
        "optimizer": _state_bytes(trainer.optimizer),
    }
    found["used"] = found["peak"] - before
    found["rest"] = found["used"] - 2 * weights - found["optimizer"]
    print(json.dumps(found))


def _load_libraries(args: argparse.Namespace, builder: Builder) -> None:
    """One step of a very small model, so that all imports are done and count as what was there before."""
    small = {
        "size": "tiny",
        "vocabulary": 64,
        "prompt": 4,
        "response": 4,
        "lengths": None,
        "steps": 1,
    }
    trainer, _ = build(argparse.Namespace(**{**vars(args), **small}), builder)
    with quiet():
        trainer.train()


def _state_bytes(optimizer: Any) -> int:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return sum(
        value.numel() * value.element_size()
        for state in inner.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )
