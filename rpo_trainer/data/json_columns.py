"""Decode messages and lists stored as text: JSON in a CSV field or in a text column."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.formats.spec import ColumnType
from rpo_trainer.data.messages import ROLE_NAMES, is_messages
from rpo_trainer.data.rows import Row, RowError, RowProblems

_PYTHON = re.compile(r"\s*\[?\s*\{\s*'")  # as pandas writes lists to CSV
_SAID = {"content", "value", "tool_calls", "function_call"}


def decode_json_columns(
    rows: Sequence[Row],
    types: Mapping[str, ColumnType],
    ids: Sequence[str],
    where: str,
    audit: Audit,
) -> list[Row]:
    """Replace texts that are JSON or Python literals of messages with the messages.

    A column is decoded if at least half of its values are such texts. Otherwise they are assumed to be text
    that a model reads or writes, and are counted as `messages_as_text`.

    Args:
        types: types of the columns that the format reads.
        ids: row ids.

    Raises:
        DataError, or Problems: only some values of a decoded column can be decoded, or the format expects
            text in the column.
    """
    decoded_rows = [dict(row) for row in rows]
    for column in [c for c, kind in types.items() if kind in ("list", "answers")]:
        for row in decoded_rows:
            if (value := _value(row.get(column), python=True)) is not None:
                row[column] = value
    problems = RowProblems(where)
    for column in [c for c, kind in types.items() if kind in ("messages", "answers", "text")]:
        turn = column.startswith(("chosen", "rejected"))  # may be one turn
        decoded = [_decoded(row.get(column), turn) for row in decoded_rows]
        indices = [i for i, value in enumerate(decoded) if value is not None]
        present = sum(row.get(column) is not None for row in decoded_rows)
        if 2 * len(indices) < present:
            for i in indices:
                audit.warn("messages_as_text", ids[i])
            continue
        for i in indices:
            if types[column] == "text":
                fault = RowError(
                    f"`{column}` is a list of messages, but its format reads text",
                    code="data.messages-for-text",
                )
                problems.add(fault, ids[i])
            decoded_rows[i][column] = decoded[i]
        for i in set(range(len(decoded_rows))) - set(indices) if indices else ():
            if isinstance(decoded_rows[i].get(column), str):
                fault = RowError(
                    f"`{column}` is text, but a list of messages in other rows",
                    code="data.mixed-column",
                )
                problems.add(fault, ids[i])
    fix = (
        "store lists instead of their JSON text, or map the column of messages: "
        "`columns: {messages: NAME}`"
    )
    problems.raise_if_any(len(rows), fix=fix)
    return decoded_rows


def _decoded(value: Any, turn: bool = False) -> Any:
    """Return the value with texts of messages decoded; None if there are none."""
    if isinstance(value, str):
        decoded = _value(value, python=_PYTHON.match(value) is not None)
        turns = [decoded] if turn and isinstance(decoded, Mapping) else decoded
        return decoded if _are_turns(turns) else None
    if not isinstance(value, list):
        return None
    if value and all(isinstance(item, str) for item in value):
        items = [_decoded(item) for item in value]
        return items if all(item is not None for item in items) else None
    if is_messages(value) and any("completion" in item for item in value):
        new = [_decoded(item.get("completion")) for item in value]
        if all(item is not None for item in new):
            return [{**item, "completion": own} for item, own in zip(value, new, strict=True)]
    return None


def _are_turns(value: object) -> bool:
    """Whether the value is a list of turns with known roles and content."""
    return is_messages(value) and all(
        str(turn.get("role", turn.get("from"))).lower() in ROLE_NAMES and not _SAID.isdisjoint(turn)
        for turn in value  # type: ignore[attr-defined]
    )


def _value(text: object, *, python: bool) -> Any:
    """Decode a list or an object from JSON or (`python`) from a Python literal; None if it is neither."""
    if not isinstance(text, str) or text.lstrip()[:1] not in ("[", "{"):
        return None
    for read in (json.loads, ast.literal_eval) if python else (json.loads,):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes
                found = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | dict):
            return found
    return None
