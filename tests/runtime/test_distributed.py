"""Helpers for several processes, alone and with substitutes for the others; see also tests/distributed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.errors import DataError, Problems, RecipeError, RPOTrainerError, RunError
from rpo_trainer.runtime import distributed
from rpo_trainer.runtime.ranks import ALONE
from tests.distributed.launch import free_port
from tests.raising import raises


def test_a_single_process_is_the_main_one():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main()
    assert distributed.on_main(lambda: 7) == 7
    assert distributed.all_gather_dict({1: "a"}) == {1: "a"}
    assert distributed.all_reduce_max(3) == 3
    with raises("run.mine", RunError), distributed.raise_on_all_ranks():
        raise RunError("mine", code="run.mine")


def test_one_process_does_what_all_ranks_do_when_there_is_only_one():
    for ranks in (ALONE, distributed.ALL_RANKS):
        assert (ranks.rank(), ranks.world_size()) == (0, 1)
        assert ranks.on_main(lambda: 7) == 7
        assert ranks.all_gather_dict({1: "a"}) == {1: "a"}
        ranks.barrier()
        with raises("run.mine", RunError), ranks.raise_on_all_ranks():
            raise RunError("mine", code="run.mine")


def test_all_ranks_are_those_of_the_launcher(two: list[Any]):
    two[:] = [{2: "b"}]
    assert distributed.ALL_RANKS.all_gather_dict({1: "a"}) == {1: "a", 2: "b"}
    assert ALONE.all_gather_dict({1: "a"}) == {1: "a"}


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The first of two processes; contributions of the second one are put into the list."""
    other: list[Any] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_object", lambda mine: [*mine, *other])
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda box: None)
    return other


def test_an_error_of_the_other_process_is_raised_here(two: list[Any]):
    two[:] = [DataError("theirs", code="data.theirs")]
    with (
        raises("data.theirs", DataError) as raised,
        distributed.raise_on_all_ranks(),
    ):
        pass
    assert raised.value.everywhere


def test_the_first_of_two_errors_is_everybodys(two: list[Any]):
    two[:] = [DataError("theirs", code="data.theirs")]
    with raises("run.mine", RunError), distributed.raise_on_all_ranks():
        raise RunError("mine", code="run.mine")


def test_without_an_error_nothing_happens(two: list[Any]):
    two[:] = [None]
    with distributed.raise_on_all_ranks():
        pass


def test_merge_joins(two: list[Any]):
    two[:] = [{2: "b"}]
    assert distributed.all_gather_dict({1: "a"}) == {1: "a", 2: "b"}


@pytest.mark.parametrize(
    "error",
    [
        RunError("what", code="run.what", where="there", why="since", fix="so"),
        Problems(
            [DataError("one", code="data.one", where="x"), RecipeError("two", code="recipe.two")]
        ),
    ],
)
def test_errors_travel(error: RPOTrainerError):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error)
    assert copy.exit_code == error.exit_code


LONG_WORK = """
import time
from datetime import timedelta
import torch
from rpo_trainer.runtime import distributed
from rpo_trainer.errors import RunError

distributed._TIMEOUT = timedelta(seconds=3)
distributed.start()

def slow():
    time.sleep(6)
    return "late"

assert distributed.on_main(slow, timeout=distributed.LONG_TIMEOUT) == "late"

def refuse():
    raise RunError("refused", code="run.x")

try:
    distributed.on_main(refuse, timeout=distributed.LONG_TIMEOUT)
except RunError as error:
    assert error.code == "run.x"
else:
    raise AssertionError("nothing was raised")
try:
    distributed.on_main(slow)
except Exception:
    print("the time limit holds for others", flush=True)
print("done", distributed.rank(), flush=True)
if not distributed.end(seconds=1):
    distributed.exit_at_once(0)
"""


@pytest.mark.slow
def test_what_takes_longer_than_the_time_limit_of_an_exchange(tmp_path: Path):
    script = tmp_path / "long_work.py"
    script.write_text(LONG_WORK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "done 0" in ended.stdout and "done 1" in ended.stdout, ended.stderr[-3000:]
    assert "the time limit holds for others" in ended.stdout


ENDING = """
import os, signal, sys
import torch
from rpo_trainer.runtime import distributed

store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
destroy = torch.distributed.destroy_process_group

def interrupted():
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    destroy()

torch.distributed.destroy_process_group = interrupted
assert distributed.end()
sys.exit(75)
"""


def test_a_signal_while_the_group_is_left_does_not_change_the_exit_code():
    """A launcher sends SIGTERM to the ranks that end after the first one with an error."""
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert ended.returncode == 75, ended.stderr[-3000:]


def test_alone_the_timeout_changes_nothing():
    assert distributed.on_main(lambda: 7, timeout=distributed.LONG_TIMEOUT) == 7
