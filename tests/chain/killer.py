"""Ends a run at a given point: by an exception, or in a separate process by SIGKILL.

Points, each of which is reached at most once:

    begin:STAGE          before the stage does anything
    step:STAGE:N         in training, N steps done
    generated:N          N batches of responses sampled, in all stages together
    file:PATH            a file of that path is being written, and half of it exists
    replace:PATH         a staged file or folder is about to be renamed to it
    replaced:PATH        it has just been renamed
    saved:STAGE:STATE    chain.json has just been written with the stage in that state
    evaluated:STAGE      held-out examples have been evaluated after training, nothing is written yet
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

MARKER = "reached"  # next to the run directory: the point was reached


class Killed(BaseException):
    """Not an Exception, so that nothing catches it, as nothing catches SIGKILL."""


@contextlib.contextmanager
def at(point: str, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` when the run reaches `point`."""
    name, _, where = point.partition(":")
    with contextlib.ExitStack() as stack:
        for patch in _PATCHES[name](where, action):
            stack.enter_context(patch)
        yield


def _around(owner: Any, name: str, before: Any = None, after: Any = None) -> Any:
    own = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = own(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    return mock.patch.object(owner, name, wrapped)


def _begin(stage: str, action: Callable[[], None]) -> list[Any]:
    from rpo_trainer.chain.run import _Chain

    def check(self: Any, started: Any, record: Any) -> None:
        if started.name == stage:
            action()

    return [_around(_Chain, "_run_stage", before=check)]


def _step(where: str, action: Callable[[], None]) -> list[Any]:
    from rpo_trainer.chain.callbacks import MetricsLog

    stage, step = where.split(":")

    def check(self: Any, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if (self.stage, state.global_step) == (stage, int(step)):
            action()

    return [_around(MetricsLog, "on_step_begin", before=check)]


def _generated(batches: str, action: Callable[[], None]) -> list[Any]:
    from rpo_trainer.rewards import sample

    done: list[None] = []

    def count(*args: Any, **kwargs: Any) -> None:
        done.append(None)
        if len(done) == int(batches):
            action()

    return [_around(sample, "_generate_batch", after=count)]


def _file(path: str, action: Callable[[], None]) -> list[Any]:
    import builtins
    import io  # pathlib opens with this function

    import safetensors.torch
    import torch
    import transformers.modeling_utils

    def check(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if str(file).endswith(path):
            half = os.open(
                file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            )  # not through the patched function
            os.write(half, b"half of a file")
            os.close(half)
            action()

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> None:
        if mode.startswith("w"):
            check(None, file)

    owners = [torch, safetensors.torch, transformers.modeling_utils]
    return [_around(owner, "open", before=opened) for owner in (builtins, io)] + [
        _around(owner, name, before=check)
        for owner in owners
        for name in ("save", "save_file", "safe_save_file")
        if hasattr(owner, name) and (owner, name) != (safetensors.torch, "save")
    ]


def _replace(path: str, action: Callable[[], None]) -> list[Any]:
    return [_around(os, "replace", before=_ends_with(path, action))]


def _replaced(path: str, action: Callable[[], None]) -> list[Any]:
    return [_around(os, "replace", after=_ends_with(path, action))]


def _ends_with(path: str, action: Callable[[], None]) -> Callable[..., None]:
    def check(source: Any, target: Any, **kwargs: Any) -> None:
        if path in str(target):
            action()

    return check


def _saved(where: str, action: Callable[[], None]) -> list[Any]:
    from rpo_trainer.chain.state import ChainState

    stage, state = where.split(":")

    def check(self: Any) -> None:
        record = self.stage(stage)
        if record is not None and record.state == state:
            action()

    return [_around(ChainState, "save", after=check)]


def _evaluated(stage: str, action: Callable[[], None]) -> list[Any]:
    from rpo_trainer.trainers.base import BaseTrainer

    def check(self: Any, *args: Any, **kwargs: Any) -> None:
        at_end = self.state.global_step and self.state.global_step >= self.state.max_steps
        if at_end and Path(self.args.output_dir).name == stage:
            action()

    return [_around(BaseTrainer, "evaluate", after=check)]


_PATCHES = {
    "begin": _begin, "step": _step, "generated": _generated, "file": _file, "replace": _replace,
    "replaced": _replaced, "saved": _saved, "evaluated": _evaluated,
}  # fmt: skip


def run_until(point: str, run: Callable[[], object]) -> None:
    """Run in this process until `point`; fails if it is not reached."""

    def kill() -> None:
        raise Killed

    with at(point, kill):
        try:
            run()
        except Killed:
            return
    raise AssertionError(f"{point} was not reached")


def in_process(folder: Path, point: str | None, number: int = signal.SIGKILL, *command: str) -> int:
    """Runs the recipe in `folder` by the command line, in a process that sends itself a signal.

    Args:
        command: in place of `run`, such as `sft` and an option.

    Returns:
        Its exit code, negative for a signal. Its output is in `folder`/output.
    """
    (folder / MARKER).unlink(missing_ok=True)
    process = _started(folder, point, number, command)
    process.join(600)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def killed_after(folder: Path, seconds: float) -> int:
    """Runs the recipe in `folder` in a process that is killed after so many seconds, wherever it is.

    Returns:
        Its exit code: -9, or 0 where it had come to its end before.
    """
    process = _started(folder, None, signal.SIGKILL, ())
    process.join(seconds)
    process.kill()
    process.join(600)
    assert process.exitcode is not None
    return process.exitcode


def _started(folder: Path, point: str | None, number: int, command: Sequence[str]) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rpo_trainer.chain", "rpo_trainer.report", "peft"])
    process = context.Process(target=_main, args=(str(folder), point, int(number), command))
    process.start()
    return process


def _main(folder: str, point: str | None, number: int, command: Sequence[str]) -> None:
    import torch

    from rpo_trainer.cli.commands import main

    output = os.open(Path(folder) / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    torch.set_num_threads(1)

    def kill() -> None:
        (Path(folder) / MARKER).write_text(str(point))
        os.kill(os.getpid(), number)

    with at(point, kill) if point else contextlib.nullcontext():
        first, *options = command or ["run", "--no-report"]
        main([first, f"{folder}/recipe.yaml", "--run-dir", f"{folder}/run", *options])
