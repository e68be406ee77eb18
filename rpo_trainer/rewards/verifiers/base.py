"""What every verifier is: a row gives a check, and the check gives a response its reward."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import RPOTrainerError

logger = logging.getLogger(__name__)

Check = Callable[[str], float]

SECONDS = 2.0  # time limit of all patterns that a row brings, per response


class FailedChecks:
    """Responses whose check failed with an exception; each got the reward 0."""

    def __init__(self) -> None:
        self.checked = 0
        self.count = 0
        self.first = ""
        self._lock = threading.Lock()

    def passed(self) -> None:
        """Counts a response that was checked."""
        with self._lock:
            self.checked += 1

    def add(self, reason: str) -> None:
        """Counts a response whose check failed."""
        with self._lock:
            self.checked += 1
            self.count += 1
            self.first = self.first or reason

    def warn(self, verifier: str) -> None:
        """Logs how many checks failed and why the first did; nothing where none failed."""
        if self.count:
            logger.warning(
                "verifier '%s': the check of %d of %d responses failed, their reward is 0 "
                "(the first: %s)",
                verifier,
                self.count,
                self.checked,
                self.first,
            )


@dataclass(frozen=True)
class Verifier:
    """Rewards computed from what a row says about right answers.

    Attributes:
        name: its name in recipes and on the command line.
        maximum: the reward of a right answer, and of nothing else.
        columns: what it reads of a row, the first of them required.
        runs_code: it runs what a response says, in another process: users must allow it.
        make_check: row → reward of a response; raises RowError where the row cannot be verified.
            Call `prepare` instead, whose check does not raise.
    """

    name: str
    maximum: float
    columns: tuple[str, ...]
    make_check: Callable[[Row], Check]
    runs_code: bool = False

    def prepare(self, row: Row, failed: FailedChecks | None = None) -> Check:
        """The check of one row's responses.

        A response cannot make the check raise: whatever goes wrong with it (a timeout, nesting that
        is too deep, a number that is too long, ...) gives the lowest reward, 0.

        Args:
            failed: counts such responses, for one warning at the end; None: each is logged.

        Raises:
            RowError: the row cannot be verified.
            RecipeError: a library is not installed.
        """
        try:
            check = self.make_check(row)
        except (RowError, RPOTrainerError, ImportError):
            raise
        except Exception as error:
            raise RowError(
                f"the row cannot be read ({_reason(error)})", code="verifier.unreadable-row"
            ) from error

        def guarded(response: str) -> float:
            try:
                reward = float(check(response))
            # A fault of the installation, and a stop that was asked for, are not the response's.
            except (RPOTrainerError, ImportError):
                raise
            except Exception as error:
                if failed is not None:
                    failed.add(_reason(error))
                else:
                    alone = FailedChecks()
                    alone.add(_reason(error))
                    alone.warn(self.name)
                return 0.0
            if failed is not None:
                failed.passed()
            return reward

        return guarded

    def __call__(self, response: str, row: Row) -> float:
        """The reward of one response. Raises RowError: the row cannot be verified."""
        return self.prepare(row)(response)


def _reason(error: Exception) -> str:
    # Without the response's text, which some messages quote (a UnicodeError all of it).
    if isinstance(error, UnicodeError):
        return f"{type(error).__name__}: {error.reason if hasattr(error, 'reason') else ''}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def ground_truth(row: Row) -> str:
    """The row's right answer, without white space at its ends. Raises RowError without one."""
    value = row.get("ground_truth")
    if not isinstance(value, str) or not value.strip():
        raise RowError(
            "no ground_truth to compare the responses with", code="verifier.missing-ground-truth"
        )
    return value.strip()


def required(row: Row, column: str) -> Any:
    """A column that must be there. Raises RowError."""
    if row.get(column) is None:
        raise RowError(f"`{column}` is absent or null", code="verifier.missing-column")
    return row[column]
