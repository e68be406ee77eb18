"""Rows that fail, by the code of the reason: `failing` has no result, `unverifiable` gives no check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rpo_trainer.data.resumable_rows import RowFailed
from rpo_trainer.data.rows import RowError


@contextmanager
def failing(code: str, named: str = "") -> Iterator[pytest.ExceptionInfo[RowFailed]]:
    """Within it a row fails with this code, and a text with `named` in it."""
    with pytest.raises(RowFailed) as raised:
        yield raised
    assert raised.value.code == code, raised.value
    assert named in str(raised.value)


@contextmanager
def unverifiable(code: str, *named: str) -> Iterator[pytest.ExceptionInfo[RowError]]:
    """Within it a row cannot be verified, with this code, and a text with all of `named` in it."""
    with pytest.raises(RowError) as raised:
        yield raised
    assert raised.value.code == code, raised.value
    for each in named:
        assert each in str(raised.value)
