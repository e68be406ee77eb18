"""Collections skip existing objects, free objects created inside, and are restored at the end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from rpo_trainer.chain.training import light_collections


class Ring:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    """Run in a separate process, because the test suite has already frozen what it loads."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_was_there_is_left_out_until_the_end() -> None:
    old = Ring()
    gone = weakref.ref(old)
    with light_collections():
        assert gc.get_freeze_count() > 1000
        del old
        gc.collect()
        assert gone() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert gone() is None


def test_what_is_made_inside_is_freed_inside() -> None:
    with light_collections():
        gone = weakref.ref(Ring())
        gc.collect()
        assert gone() is None


def test_garbage_from_before_is_freed_first() -> None:
    gone = weakref.ref(Ring())
    with light_collections():
        assert gone() is None


def test_an_error_inside_undoes_it_too() -> None:
    with pytest.raises(ValueError, match="inside"), light_collections():
        raise ValueError("inside")
    assert gc.get_freeze_count() == 0


def test_a_process_that_has_frozen_its_own_is_left_alone() -> None:
    old = Ring()
    gone = weakref.ref(old)
    gc.freeze()
    count = gc.get_freeze_count()
    with light_collections():
        del old
        gc.collect()
        assert gone() is not None  # frozen with the others
    gc.collect()
    assert gone() is not None
    # Frozen objects without references are freed one by one.
    assert count * 0.99 < gc.get_freeze_count() <= count
