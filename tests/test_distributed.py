"""The helpers of several processes, alone and with stand-ins for the others; see also tests/distributed."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from rpo_trainer import distributed
from rpo_trainer.errors import DataError, Problems, RecipeError, RPOTrainerError, RunError


def test_a_single_process_is_the_main_one():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main()
    assert distributed.on_main(lambda: 7) == 7
    assert distributed.merge({1: "a"}) == {1: "a"}
    assert distributed.greatest(3) == 3
    with pytest.raises(RunError, match="mine"), distributed.together():
        raise RunError("mine")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The first of two processes; what the second one contributes is put into the list."""
    other: list[Any] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_object", lambda mine: [*mine, *other])
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda box: None)
    return other


def test_an_error_of_the_other_process_is_raised_here(two: list[Any]):
    two[:] = [DataError("row 7 is empty")]
    with pytest.raises(DataError, match="row 7 is empty") as raised, distributed.together():
        pass
    assert raised.value.everywhere


def test_the_first_of_two_errors_is_everybodys(two: list[Any]):
    two[:] = [DataError("theirs")]
    with pytest.raises(RunError, match="mine"), distributed.together():
        raise RunError("mine")


def test_without_an_error_nothing_happens(two: list[Any]):
    two[:] = [None]
    with distributed.together():
        pass


def test_merge_joins(two: list[Any]):
    two[:] = [{2: "b"}]
    assert distributed.merge({1: "a"}) == {1: "a", 2: "b"}


@pytest.mark.parametrize(
    "error",
    [
        RunError("what", where="there", why="since", fix="so"),
        Problems([DataError("one", where="x"), RecipeError("two")]),
    ],
)
def test_errors_travel(error: RPOTrainerError):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error)
    assert copy.exit_code == error.exit_code
