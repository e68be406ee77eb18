"""What becomes of every setting of `transformers.TrainingArguments`: read, refused, or without effect.

`argument_table.py` has the rows. A refused setting may only have the values that change nothing; a config
raises on any other. `docs/training-arguments.md` is generated from the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

Status = Literal["read", "refused", "harmless"]


@dataclass(frozen=True)
class Problem:
    """A setting of a config that cannot be taken; all of a config are reported by one error.

    Attributes:
        text: a sentence.
        code: of the kind of mistake.
        setting: its name, dotted within another one.
    """

    text: str
    code: str
    setting: str


@dataclass(frozen=True)
class Setting:
    """One row of a table of settings.

    Attributes:
        names: the fields that the row is about.
        status: `read`: it acts; `refused`: only the values of `taken` are accepted; `harmless`: no result
            depends on it.
        text: who reads it and what it does, why it is refused, or why nothing depends on it.
        instead: for refused values, what to write.
        taken: the values that are accepted; empty: the default of transformers alone, for a refused field.
        not_taken: of a field that is read, the values that are refused.
        recipe: why `training_args` of a recipe cannot have it, where a trainer takes it.
        some_versions: the field is missing in some supported versions of transformers.
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
    """Settings that act; `names` are separated by blanks."""
    return Setting(
        tuple(names.split()), "read", text, instead, (), not_taken, recipe, some_versions
    )


def refused(names: str, text: str, instead: str, *taken: Any) -> Setting:
    """Settings of which only the values of `taken` (by default transformers' own default) are accepted."""
    return Setting(tuple(names.split()), "refused", text, instead, taken)


def harmless(names: str, text: str) -> Setting:
    """Settings on which nothing depends."""
    return Setting(tuple(names.split()), "harmless", text)


def by_name(table: Iterable[Setting]) -> dict[str, Setting]:
    """The rows of a table by field."""
    return {name: row for row in table for name in row.names}


def defaults_of(config: type) -> dict[str, Any]:
    """The defaults of a dataclass, by field."""
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
    """A problem for each value that a table refuses.

    Args:
        values: the settings by name.
        defaults: what each is where nobody has set it.
        prefix: what stands before the name of a setting in a sentence.
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
