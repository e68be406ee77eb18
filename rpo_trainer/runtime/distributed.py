"""Distributed processes: the main rank, barriers, gathers, errors raised on all ranks.

A thin layer over accelerate's `PartialState`, which supports all launchers. In a single process, functions
here have no communication.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FunctionType
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.runtime.devices import has_accelerator, widest_float
from rpo_trainer.runtime.ranks import Ranks

T = TypeVar("T")

# Ranks wait this long, for one that saves a large model for example; launchers detect dead ones.
_TIMEOUT = timedelta(hours=2)
LONG_TIMEOUT = timedelta(days=30)  # of `on_main`, for work that may take hours
_END_SECONDS = 30.0
_waits = itertools.count()


def start() -> None:
    """Join the ranks that a launcher has started, each on its device."""
    gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {}
    if "LOCAL_RANK" in os.environ:
        settings["timeout"] = _TIMEOUT
        if gpu:
            settings["backend"] = "cuda:nccl,cpu:gloo"  # small exchanges do not use the GPU
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            _rejoin_after_restart(settings.get("backend", "gloo"))
    PartialState(cpu=not has_accelerator(), **settings)


def _rejoin_after_restart(backend: str) -> None:
    """Join ranks that torchrun has restarted.

    torchrun keeps one store for all attempts, which may hold the address of a dead rank.
    """
    store, own_rank, ranks = next(rendezvous("env://"))
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store),
        rank=own_rank,
        world_size=ranks,
        timeout=_TIMEOUT,
    )


def rank() -> int:
    """Return the rank of this process, from 0."""
    return int(PartialState().process_index)


def world_size() -> int:
    """Return the number of processes; safe in signal handlers while the state is created."""
    known = PartialState._shared_state.get("num_processes")
    return int(os.environ.get("WORLD_SIZE", 1) if known is None else known)


def is_main() -> bool:
    """Whether this is the main process, which writes files."""
    return bool(PartialState().is_main_process)


def device() -> torch.device:
    """Return the device of this process."""
    return torch.device(PartialState().device)


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Keep the process state unchanged by TrainingArguments created inside for another device."""
    states: list[dict[str, Any]] = [PartialState._shared_state, AcceleratorState._shared_state]
    found = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, before in zip(states, found, strict=True):
            state.clear()
            state.update(before)


def barrier() -> None:
    """Wait for all processes."""
    PartialState().wait_for_everyone()


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise an error of one process inside on all processes; code inside must not communicate."""
    error: RPOTrainerError | None = None
    try:
        yield
    except RPOTrainerError as raised:
        error = raised
    if world_size() == 1:
        if error is not None:
            raise error
        return
    first = next((one for one in gather_object([error]) if one is not None), None)
    if first is not None:
        first.everywhere = True
        raise first


def on_main(do: Callable[[], T], *, timeout: timedelta | None = None) -> T:
    """Run `do` on the main process only; its result or error is that of every process.

    Args:
        timeout: how long other processes wait; None: the timeout of the process group.
    """
    if timeout is not None and world_size() > 1:
        do = _waited_for(do, timeout)
    result: Any = None
    with raise_on_all_ranks():
        if is_main():
            result = do()
    return broadcast(result)  # type: ignore[no-any-return]


def _waited_for(do: Callable[[], T], timeout: timedelta) -> Callable[[], T]:
    """Run `do` on the main process while the others wait at the store; returns a getter of its result."""
    store, key = _get_default_store(), f"rpo_trainer/on_main/{next(_waits)}"
    found: list[T] = []
    error: RPOTrainerError | None = None
    if is_main():
        try:
            found.append(do())
        except RPOTrainerError as raised:
            error = raised
        finally:
            store.set(key, "done")
    else:
        store.wait([key], timeout)

    def result() -> T:
        if error is not None:
            raise error
        return found[0]

    return result


def broadcast(value: T) -> T:
    """Return the main process's value on all processes."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    broadcast_object_list(box)
    return box[0]  # type: ignore[no-any-return]


def all_gather_dict(values: dict[Any, T]) -> dict[Any, T]:
    """Merge the dicts of all processes on each of them."""
    if world_size() == 1:
        return values
    return {key: value for part in gather_object([values]) for key, value in part.items()}


class _AllRanks(Ranks):
    """The functions of this module as `Ranks`."""

    rank = staticmethod(rank)
    world_size = staticmethod(world_size)
    barrier = staticmethod(barrier)
    raise_on_all_ranks = staticmethod(raise_on_all_ranks)
    on_main = staticmethod(on_main)
    all_gather_dict = staticmethod(all_gather_dict)


ALL_RANKS = _AllRanks()


def all_reduce_max(value: int) -> int:
    """Return the maximum over all processes; the exchange uses gloo if available."""
    return int(all_reduce_max_float(value))


def all_reduce_max_float(value: float) -> float:
    """Return the maximum over all ranks as `all_reduce_max` does, for floats (float64)."""
    if world_size() == 1:
        return value
    on_cpu = "gloo" in torch.distributed.get_backend_config()
    place = torch.device("cpu") if on_cpu else device()
    found = torch.tensor([value], dtype=widest_float(place), device=place)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return float(found.item())


def end(seconds: float = _END_SECONDS) -> bool:
    """Leave the process group permanently.

    Threads of a process group (gloo's, NCCL's watchdog) end with its last reference. A thread that still runs
    while Python shuts down is terminated in C++ code when it next takes the interpreter lock, which aborts
    the process (exit code -6, "terminate called without an active exception").

    SIGTERM and SIGINT are ignored from here on: the process exits with its own code, and a launcher that sees
    one rank fail sends SIGTERM to the others.

    Args:
        seconds: time limit, for example if another process hangs.

    Returns:
        Whether the group was destroyed. If False, use `exit_at_once` to end the process safely.
    """
    if not torch.distributed.is_initialized():
        return True
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    known = list(torch.distributed.distributed_c10d._world.pg_map)
    _drop_defaults(known)
    groups = [weakref.ref(group) for group in known]
    del known
    failed: list[BaseException] = []

    def leave() -> None:
        try:
            torch.distributed.destroy_process_group()
        except RuntimeError as error:  # another process has died
            failed.append(error)

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(seconds)
    gc.collect()
    return not (leaving.is_alive() or failed or any(group() is not None for group in groups))


def _drop_defaults(groups: list[Any]) -> None:
    """Remove process groups from default arguments of functions.

    Modules of torch and DeepSpeed have `group=group.WORLD`. If imported while a group exists, they keep it
    alive until Python shuts down.
    """
    held = set(map(id, groups))
    for function in gc.get_objects():
        if type(function) is not FunctionType:  # isinstance() would make deprecated objects warn
            continue
        if function.__defaults__ and not held.isdisjoint(map(id, function.__defaults__)):
            function.__defaults__ = tuple(
                None if id(value) in held else value for value in function.__defaults__
            )
        named = function.__kwdefaults__
        if named and not held.isdisjoint(map(id, named.values())):
            function.__kwdefaults__ = {k: None if id(v) in held else v for k, v in named.items()}


def exit_at_once(code: int) -> NoReturn:
    """Run the registered exit functions and end the process without Python's shutdown."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or not read by any process
            stream.flush()
    os._exit(code)
