"""Errors meant for people: where, what, why, how to fix.

The command line prints them without a traceback and ends with their `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rpo_trainer.redact import redact


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """The nearest known word, if one is near."""
    word = word.lower().replace("-", "_")
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    # `exact_match` is a longer name for `exact`, however many letters it shares with others.
    near += [name for name in known if word.startswith(f"{name}_") or name.startswith(f"{word}_")]
    near += difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return near[0] if near else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the word of `did_you_mean`, or "" if there is none."""
    near = did_you_mean(word, list(known))
    return f"; did you mean `{near}`?" if near else ""


def first_line(error: BaseException) -> str:
    """What a library says before it goes into detail; the error's class where it says nothing.

    Secrets are removed before it is cut to 300 characters, or a part of one could be left.
    """
    return redact(next(iter(str(error).strip().splitlines()), type(error).__name__))[:300]


def last_line(error: BaseException) -> str:
    """What a library says after a list of details; the error's class where it says nothing."""
    return [type(error).__name__, *str(error).strip().splitlines()][-1].strip()


class RPOTrainerError(Exception):
    """Base of every error this package raises on purpose. Its texts hold no secrets, see `redact`.

    Args:
        what: one sentence, what is wrong.
        code: stable name of the mistake, `part.kebab-case`, such as `recipe.unknown-key`. The wording may
            change, the code does not: programs and tests go by it.
        where: file:line, recipe key or stage, so that the reader can go there.
        why: why it matters, or why it cannot be guessed.
        fix: what to do about it.
        details: values that programs may want, such as the names of missing tensors.
    """

    exit_code = 1
    everywhere = False  # every process of a run raises it: one of them shows it

    def __init__(
        self,
        what: str,
        *,
        code: str,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.what = redact(what)
        self.code = code
        self.details = dict(details or {})
        self.where = where and redact(where)
        self.why = why and redact(why)
        self.fix = fix and redact(fix)
        super().__init__(self._text())

    def at(self, where: str) -> RPOTrainerError:
        """The same error, at a place that the caller knows better."""
        self.where = redact(where)
        self.args = (self._text(),)
        return self

    def __reduce__(self) -> Any:
        return _unpickled, (type(self), self.args, self.__dict__)

    def _text(self) -> str:
        what = f"{self.where}: {self.what}" if self.where else self.what
        lines = [f"{what} [{self.code}]"]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def _unpickled(kind: type[RPOTrainerError], args: Any, state: dict[str, Any]) -> RPOTrainerError:
    """An error from another process, without its constructor: `args` is the whole text."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class RecipeError(RPOTrainerError, ValueError):
    """The recipe, an argument or an option is wrong: the user's mistake."""

    exit_code = 2
    everywhere = True


class ModelError(RPOTrainerError):
    """The model or the tokenizer cannot be used as asked."""

    exit_code = 2


class RunError(RPOTrainerError):
    """The run directory cannot be used as asked (in use, not ours, changed inputs)."""

    exit_code = 2


class DataError(RPOTrainerError):
    """The data cannot be used: a file, a row, a reward."""

    exit_code = 3


class NonFiniteError(RPOTrainerError):
    """A loss or a gradient is NaN or infinite; the optimizer has not moved."""

    exit_code = 4
    everywhere = True


class TemplateError(RPOTrainerError):
    """A chat template that renders a conversation differently in training than in sampling."""

    exit_code = 5


class StepZeroError(RPOTrainerError):
    """The loss before the first update is not the constant that policy = reference gives."""

    exit_code = 2
    everywhere = True
    values: Mapping[str, float] = {}  # what was measured


class StoppedBySignal(RPOTrainerError):
    """Stopped by a signal, after a complete checkpoint."""

    exit_code = 75
    everywhere = True


class Problems(RPOTrainerError):
    """Several errors, reported at once; the exit code is the largest of theirs."""

    def __init__(self, problems: Sequence[RPOTrainerError]) -> None:
        if not problems:
            raise ValueError("Problems needs at least one error")
        self.problems = list(problems)
        self.exit_code = max(problem.exit_code for problem in problems)
        self.everywhere = all(problem.everywhere for problem in problems)
        n = len(self.problems)
        super().__init__(f"{n} problem{'s' if n > 1 else ''} found", code=self.problems[0].code)

    def __reduce__(self) -> tuple[type[Problems], tuple[list[RPOTrainerError]]]:
        return Problems, (self.problems,)

    def __str__(self) -> str:
        return "\n".join([*(str(problem) for problem in self.problems), self.what])
