"""`failing`: a row that finally has no result, by the code of the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rpo_trainer.rewards.rowfile import RowFailed


@contextmanager
def failing(code: str, named: str = "") -> Iterator[pytest.ExceptionInfo[RowFailed]]:
    """Within it a row fails with this code, and a text with `named` in it."""
    with pytest.raises(RowFailed) as raised:
        yield raised
    assert raised.value.code == code, raised.value
    assert named in str(raised.value)
