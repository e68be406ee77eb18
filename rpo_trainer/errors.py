"""Errors shown to users: what is wrong, where, why it matters and how to fix it.

The command line prints them without a traceback and exits with their `exit_code`. `str(error)` is one line
for each part, for logs and pipes; `render` wraps the same parts for a terminal.
"""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rpo_trainer.redact import redact


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """Return the known word that is most similar to `word`, or None."""
    word = word.lower().replace("-", "_")
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    # A name that extends the word, or is extended by it, is preferred: `exact` for `exact_match`.
    near += [name for name in known if word.startswith(f"{name}_") or name.startswith(f"{word}_")]
    near += difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return near[0] if near else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the word of `did_you_mean`, or "" if there is none."""
    near = did_you_mean(word, list(known))
    return f"; did you mean `{near}`?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if the message is empty.

    Secrets are removed before the line is truncated to 300 characters: part of one could remain otherwise.
    """
    return redact(next(iter(str(error).strip().splitlines()), type(error).__name__))[:300]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, or its class name if the message is empty."""
    return [type(error).__name__, *str(error).strip().splitlines()][-1].strip()


class RPOTrainerError(Exception):
    """Base class of the errors that this package raises. Secrets are removed from all texts (`redact`).

    Args:
        what: one sentence that says what is wrong.
        code: stable identifier, `part.kebab-case`, such as `recipe.unknown-key`. The wording may change, the
            code does not: programs and tests use it.
        where: file and line, recipe key or stage.
        why: background that `what` and `fix` do not give; None if there is none.
        fix: how to fix it, as an imperative.
        details: values for programs, such as the names of missing tensors.
    """

    exit_code = 1
    everywhere = False  # raised by every process of a run, so that only one of them prints it

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
        """Set `where`, for a caller with a more precise location, and return the error."""
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
    """Rebuild an error from another process without calling its constructor (`args` is the full text)."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class RecipeError(RPOTrainerError, ValueError):
    """The recipe, an argument or a command line option is invalid."""

    exit_code = 2
    everywhere = True


class ModelError(RPOTrainerError):
    """The model or the tokenizer cannot be used for what the recipe requires."""

    exit_code = 2


class RunError(RPOTrainerError):
    """The run directory cannot be used: locked, written by another program, or its inputs have changed."""

    exit_code = 2


class DataError(RPOTrainerError):
    """A file, a row or a reward cannot be used."""

    exit_code = 3


class NonFiniteError(RPOTrainerError):
    """A loss or a gradient is NaN or infinite; the optimizer has not been stepped."""

    exit_code = 4
    everywhere = True


class TemplateError(RPOTrainerError):
    """A chat template renders a conversation differently for training than for generation."""

    exit_code = 5


class StepZeroError(RPOTrainerError):
    """The loss before the first update is not the value that policy = reference model implies."""

    exit_code = 2
    everywhere = True
    values: Mapping[str, float] = {}  # measured and expected


class StoppedBySignal(RPOTrainerError):
    """Stopped by a signal, after a complete checkpoint was written."""

    exit_code = 75
    everywhere = True


class Problems(RPOTrainerError):
    """Several errors reported together; the exit code is the largest of theirs."""

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


# ---------------------------------------------------------------- for a terminal


def error_text(error: RPOTrainerError, stream: TextIO) -> str:
    """Format an error for a stream: `render` for a terminal, otherwise `error: ` and one line for each
    part."""
    if not stream.isatty():
        return f"error: {error}"
    return render(error, min(shutil.get_terminal_size().columns, 100))


def render(error: RPOTrainerError, width: int = 80) -> str:
    """Format an error, or each of several, for a terminal.

    Lines are broken between words at `width` columns, with continuation lines aligned. Paths are never
    broken: they have their own line, and may exceed `width`.

    Args:
        width: columns; at least 40 are used.
    """
    if not isinstance(error, Problems):
        return _rendered(error, max(40, width))
    rendered = [_rendered(problem, max(40, width)) for problem in error.problems]
    return "\n\n".join([*rendered, error.what])


def _rendered(error: RPOTrainerError, width: int) -> str:
    parts = {"   at: ": error.where, "  why: ": error.why, "  fix: ": error.fix}
    lines = _wrapped(f"error[{error.code}]: ", error.what, width)
    for label, text in parts.items():
        lines += _wrapped(label, text, width) if text else []
    return "\n".join(lines)


def _wrapped(label: str, text: str, width: int) -> list[str]:
    """Return a labeled text, wrapped; its line breaks and indentation (an example in YAML) are kept."""
    lines: list[str] = []
    for line in text.splitlines():
        indent = " " * (7 + len(line) - len(line.lstrip()))
        lines += textwrap.wrap(
            line.strip(),
            width,
            initial_indent=indent if lines else label,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return lines
