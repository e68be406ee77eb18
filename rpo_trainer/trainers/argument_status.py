"""Status of each setting of `transformers.TrainingArguments`: read, refused, or harmless.

The rows are in `argument_table.py`. A refused setting only accepts values that change nothing; a config
raises for any other. `docs/training-arguments.md` is generated from the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

Status = Literal["read", "refused", "harmless"]


@dataclass(frozen=True)
class Problem:
    """A setting of a config that is refused; one error reports all of a config.

    Attributes:
        text: the message.
        code: code of the error.
        setting: name of the setting, dotted if it is nested.
    """

    text: str
    code: str
    setting: str


@dataclass(frozen=True)
class Setting:
    """One row of a table of settings.

    Attributes:
        names: the fields of this row.
        status: `read`: it takes effect; `refused`: only the values of `taken` are accepted; `harmless`: no
            result depends on it.
        text: what it does, why it is refused, or why no result depends on it.
        instead: what to use instead of refused values.
        taken: accepted values of a refused field; empty: only the default of transformers.
        not_taken: refused values of a field that is read.
        recipe: why a recipe's `training_args` cannot contain it although trainers accept it.
        some_versions: whether some supported versions of transformers lack the field.
    """

    names: tuple[str, ...]
    status: Status
    text: str
    instead: str = ""
    taken: tuple[Any, ...] = ()
    not_taken: tuple[Any, ...] = ()
    recipe: str = ""
    some_versions: bool = False


def read(
    names: str,
    text: str,
    *,
    not_taken: tuple[Any, ...] = (),
    instead: str = "",
    recipe: str = "",
    some_versions: bool = False,
) -> Setting:
    """Return settings that take effect; `names` are separated by spaces."""
    return Setting(
        tuple(names.split()), "read", text, instead, (), not_taken, recipe, some_versions
    )


def refused(names: str, text: str, instead: str, *taken: Any) -> Setting:
    """Return settings that only accept the values of `taken` (if empty, the default of transformers)."""
    return Setting(tuple(names.split()), "refused", text, instead, taken)


def harmless(names: str, text: str) -> Setting:
    """Return settings that change no result."""
    return Setting(tuple(names.split()), "harmless", text)


def by_name(table: Iterable[Setting]) -> dict[str, Setting]:
    """Return the rows of a table by field."""
    return {name: row for row in table for name in row.names}


def defaults_of(config: type) -> dict[str, Any]:
    """Return the defaults of a dataclass, by field."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
    }


def refusals(
    table: Iterable[Setting],
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    prefix: str = "",
) -> Iterator[Problem]:
    """Yield a problem for each value that a table refuses.

    Args:
        values: the settings by name.
        defaults: their defaults.
        prefix: put before the name of a setting in messages.
    """
    for name, row in by_name(table).items():
        if name not in values or row.status == "harmless":
            continue
        value = values[name]
        if row.status == "refused":
            wrong = not any(_same(value, taken) for taken in row.taken or (defaults.get(name),))
            why = f" ({row.text}): {row.instead}"
        else:
            parts = value if isinstance(value, list) else [value]
            wrong = any(_same(part, other) for part in parts for other in row.not_taken)
            why = f": {row.instead}"
        if wrong:
            yield Problem(
                f"{prefix}{name}={_shown(value)} is not supported{why}",
                code="training.unsupported-setting",
                setting=prefix + name,
            )


def _same(value: Any, other: Any) -> bool:
    value = getattr(value, "value", value)  # enums of transformers
    if isinstance(value, bool) is not isinstance(other, bool):
        return False
    return bool(value == other)


def _shown(value: Any) -> str:
    return repr(getattr(value, "value", value))
