"""Base of all verifiers: each row has a check, which maps a response to its reward."""

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

SECONDS = 2.0  # time limit per response for the patterns of a row


class FailedChecks:
    """Counts responses whose check raised an exception; each gets the reward 0."""

    def __init__(self) -> None:
        self.checked = 0
        self.count = 0
        self.first = ""
        self._lock = threading.Lock()

    def passed(self) -> None:
        """Count a checked response."""
        with self._lock:
            self.checked += 1

    def add(self, reason: str) -> None:
        """Count a response whose check failed."""
        with self._lock:
            self.checked += 1
            self.count += 1
            self.first = self.first or reason

    def warn(self, verifier: str) -> None:
        """Log the number of failed checks, if any, and the reason of the first."""
        if self.count:
            logger.warning(
                "verifier '%s': the checks of %d of %d responses failed; their reward is 0 "
                "(the first: %s)",
                verifier,
                self.count,
                self.checked,
                self.first,
            )


@dataclass(frozen=True)
class Verifier:
    """A verifier.

    Attributes:
        name: its name in recipes and on the command line.
        maximum: the reward of a correct response, which no other response gets.
        columns: the columns it reads; the first is required.
        make_check: row → function from a response to its reward; raises RowError if the row cannot be
            verified. Call `prepare` instead, whose function does not raise.
        runs_code: whether it executes the code of a response, in another process; users must allow it.
    """

    name: str
    maximum: float
    columns: tuple[str, ...]
    make_check: Callable[[Row], Check]
    runs_code: bool = False

    def prepare(self, row: Row, failed: FailedChecks | None = None) -> Check:
        """Return the check for the responses of one row.

        The check does not raise because of a response: failures (a timeout, deep nesting, a long number,
            ...) result in the lowest reward, 0.

        Args:
            row: the row.
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
            # Problems of the installation do not depend on the response.
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
        """Return the reward of one response. Raises RowError if the row cannot be verified."""
        return self.prepare(row)(response)


def _reason(error: Exception) -> str:
    # Without the text of the response, which some messages quote (UnicodeError quotes all of it).
    if isinstance(error, UnicodeError):
        return f"{type(error).__name__}: {error.reason if hasattr(error, 'reason') else ''}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def ground_truth(row: Row) -> str:
    """Return the ground truth of a row, stripped. Raises RowError if there is none."""
    value = row.get("ground_truth")
    if not isinstance(value, str) or not value.strip():
        raise RowError("the row has no ground_truth", code="verifier.missing-ground-truth")
    return value.strip()


def required(row: Row, column: str) -> Any:
    """Return a required column. Raises RowError if it is absent or null."""
    if row.get(column) is None:
        raise RowError(f"`{column}` is missing or null", code="verifier.missing-column")
    return row[column]
