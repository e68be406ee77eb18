"""Messages and lists that a file holds as text: JSON inside a CSV field, or in a column of texts."""

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
    """The rows with messages in place of texts that say them, as JSON or as Python writes them.

    A column is decoded where at least half of its values are such texts; a few among others are texts
    that a model is to write or to read, and are counted as `messages_as_text`.

    Args:
        types: of the columns that the format reads.
        ids: of the rows.

    Raises:
        DataError, or Problems: some values of a column can be decoded and the others cannot; or the
            format takes only text there.
    """
    found = [dict(row) for row in rows]
    for column in [c for c, kind in types.items() if kind in ("list", "answers")]:
        for row in found:
            if (value := _value(row.get(column), python=True)) is not None:
                row[column] = value
    problems = RowProblems(where)
    for column in [c for c, kind in types.items() if kind in ("messages", "answers", "text")]:
        turn = column.startswith(("chosen", "rejected"))  # may be one turn
        decoded = [_decoded(row.get(column), turn) for row in found]
        those = [i for i, value in enumerate(decoded) if value is not None]
        given = sum(row.get(column) is not None for row in found)
        if 2 * len(those) < given:
            for i in those:
                audit.warn("messages_as_text", ids[i])
            continue
        for i in those:
            if types[column] == "text":
                fault = RowError(
                    f"`{column}` is a list of messages, and its format reads text",
                    code="data.messages-for-text",
                )
                problems.add(fault, ids[i])
            found[i][column] = decoded[i]
        for i in set(range(len(found))) - set(those) if those else ():
            if isinstance(found[i].get(column), str):
                fault = RowError(
                    f"`{column}` is text that is not JSON, and a list of messages in other rows",
                    code="data.mixed-column",
                )
                problems.add(fault, ids[i])
    fix = (
        "write the lists themselves in place of their text, or name the column of messages: "
        "`columns: {messages: theirs}`"
    )
    problems.raise_if_any(len(rows), fix=fix)
    return found


def _decoded(value: Any, turn: bool = False) -> Any:
    """The value with messages in place of each text that says them; None: no text does."""
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
    """Whether it is a list of turns of known roles, with what they say."""
    return is_messages(value) and all(
        str(turn.get("role", turn.get("from"))).lower() in ROLE_NAMES and not _SAID.isdisjoint(turn)
        for turn in value  # type: ignore[attr-defined]
    )


def _value(text: object, *, python: bool) -> Any:
    """The list or object that a text says, as JSON or (`python`) as Python writes it; None: none."""
    if not isinstance(text, str) or text.lstrip()[:1] not in ("[", "{"):
        return None
    for read in (json.loads, ast.literal_eval) if python else (json.loads,):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in texts
                found = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | dict):
            return found
    return None
