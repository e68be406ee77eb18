"""Damaged files of a model or tokenizer: library errors become a ModelError."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from rpo_trainer.errors import ModelError, RPOTrainerError, first_line
from rpo_trainer.runtime.files import kind_of_file

F = TypeVar("F", bound=Callable[..., Any])

# Raised by Python and libraries for unexpected file content. Not RuntimeError, which may come from the
# device or a lack of memory.
UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    ImportError, AssertionError, NotImplementedError,
)  # fmt: skip
_MOST = {
    "num_hidden_layers": 10**4, "hidden_size": 10**7, "intermediate_size": 10**8, "vocab_size": 10**8,
    "num_attention_heads": 10**5,
}  # fmt: skip
_BY_NAME = ("StrictDataclassError", "SafetensorError", "PanicException")  # not public classes


@contextmanager
def reading(what: str, where: str) -> Iterator[None]:
    """Turn library errors about files, and a lack of memory, into a ModelError.

    Args:
        what: what is read, such as `the tokenizer`.
        where: its place, for the error.
    """
    try:
        yield
    except RPOTrainerError:
        raise
    except BaseException as error:  # a panic of tokenizers is not an Exception
        if is_out_of_memory(error):
            raise ModelError(
                f"there is not enough memory to load {what}",
                code="model.out-of-memory",
                where=where,
                why=first_line(error),
                fix="use a machine with more memory, fewer processes on it, or a smaller or quantized model",
            ) from error
        named = any(kind.__name__ in _BY_NAME for kind in type(error).__mro__)
        if not isinstance(error, UNREADABLE) and not named:
            raise
        raise ModelError(
            f"{what} cannot be read: {type(error).__name__}: {first_line(error)}",
            code="model.unreadable",
            where=where,
            why="a file is damaged or has unexpected content",
            fix="copy or download the files again",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the machine or of a device is exhausted; torch raises a RuntimeError on CPUs."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def device_failed(error: BaseException) -> bool:
    """Whether memory or an accelerator has failed, not the loaded files."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return is_out_of_memory(error) or "AcceleratorError" in names or "CUDA error" in str(error)


def reads(what: str, where: Callable[..., str]) -> Callable[[F], F]:
    """Decorate a function with `reading`.

    Args:
        where: maps the function's arguments to the place.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with reading(what, where(*args, **kwargs)):
                return function(*args, **kwargs)

        return cast(F, guarded)

    return decorate


def require_files(folder: Path, where: str) -> None:
    """Raise ModelError if a directory contains anything but files and directories.

    Reading from a pipe would wait for its writer, and a device may never end.
    """
    try:
        found = [(path, kind) for path in folder.iterdir() if (kind := kind_of_file(path))]
    except OSError as error:
        raise ModelError(
            f"the directory cannot be read: {error.strerror or error}",
            code="model.unreadable",
            where=where,
            why="it contains the model's files",
            fix="check the path and its permissions",
        ) from error
    for path, kind in found:
        raise ModelError(
            f"{path.name} is {kind}, not a file",
            code="model.not-a-file",
            where=where,
            why="reading it could wait forever",
            fix="replace it with a regular file, or remove it",
        )


def require_sizes(config: Any, where: str) -> Any:
    """Return the configuration; ModelError if its sizes are implausibly large."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, most in _MOST.items():
            value = getattr(part, name, None)
            if isinstance(value, int) and value > most:
                raise ModelError(
                    f"{name} is {value}",
                    code="model.size-out-of-range",
                    where=where,
                    why=f"the limit is {most}",
                    fix="correct the model's configuration",
                )
    return config
