"""Rows that fail, by the code of the reason: `failing` has no result, `unverifiable` no check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rpo_trainer.data.resumable_rows import RowFailed
from rpo_trainer.data.rows import RowError


@contextmanager
def failing(code: str, named: str = "") -> Iterator[pytest.ExceptionInfo[RowFailed]]:
    """Assert that a row fails in the block with this code, and a text that contains `named`."""
    with pytest.raises(RowFailed) as raised:
        yield raised
    assert raised.value.code == code, raised.value
    assert named in str(raised.value)


@contextmanager
def unverifiable(code: str, *named: str) -> Iterator[pytest.ExceptionInfo[RowError]]:
    """Assert that a row cannot be verified in the block, with this code, and a text with all of `named`."""
    with pytest.raises(RowError) as raised:
        yield raised
    assert raised.value.code == code, raised.value
    for each in named:
        assert each in str(raised.value)
