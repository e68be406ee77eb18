"""`raises`: asserts an error by its code and fields; the wording is in one file, `error_wording.json`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rpo_trainer.errors import Problems, RPOTrainerError


def problems_of(error: BaseException) -> list[RPOTrainerError]:
    """Return the errors of `Problems`, or the error itself."""
    assert isinstance(error, RPOTrainerError), error
    return list(error.problems) if isinstance(error, Problems) else [error]


def codes_of(error: BaseException) -> list[str]:
    return [problem.code for problem in problems_of(error)]


def with_code(error: BaseException, code: str) -> RPOTrainerError:
    """Return the first of its errors with the code."""
    found = [problem for problem in problems_of(error) if problem.code == code]
    assert found, f"no {code} among {codes_of(error)}: {error}"
    return found[0]


@contextmanager
def raises(
    code: str, kind: type[RPOTrainerError] = RPOTrainerError, **fields: Any
) -> Iterator[pytest.ExceptionInfo[RPOTrainerError]]:
    """Assert that the block raises an error with this code.

    Args:
        code: of the error; of several errors (`Problems`), one must have it.
        kind: class of the raised error.
        fields: attributes (`where`, `exit_code`) or details of the error, and their values.
    """
    with pytest.raises(kind) as raised:
        yield raised
    error = with_code(raised.value, code)
    for name, value in fields.items():
        found = error.details[name] if name in error.details else getattr(error, name)
        assert found == value, (name, found, value)
