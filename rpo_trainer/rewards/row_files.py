"""Read rows for scorers and policies from files, and write them in formats that stages read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.detect import find_format, kind_of
from rpo_trainer.data.formats import FORMATS
from rpo_trainer.data.rows import (
    Kind,
    Row,
    RowError,
    RowProblems,
    SpecialTokens,
    extra_message_fields,
    response_message,
)
from rpo_trainer.data.sources import RawSource, load_source
from rpo_trainer.errors import DataError
from rpo_trainer.recipe import SourceSpec
from rpo_trainer.rewards.verifiers import VERIFIERS

Shape = Literal["pair", "responses", "single"]
# Columns that verifiers read, and those that `generate` and `score` add.
_COLUMNS = {column for verifier in VERIFIERS.values() for column in verifier.columns} | {
    "answers", "finished", "judge", "policies", "rewards", "sampling", "scores",
    "special_tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Responses:
    """Rows with responses to score.

    Attributes:
        rows: internal rows with `prompt`, `responses` and the other columns of the file.
        shape: the format they are written in: `pair` (chosen, rejected), `responses` (K), or `single`.
        audit: counts of what was read.
    """

    rows: list[Row]
    shape: Shape
    audit: Audit

    def written(self, rows: Sequence[Row]) -> list[Row]:
        """Return scored rows in the columns of a known format."""
        return [_WRITTEN[self.shape](row) for row in rows]


def source_of(
    path: Path | str,
    format: str | None = None,
    columns: dict[str, str] | None = None,
    special_tokens: SpecialTokens | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> SourceSpec:
    """Return the source of a recipe for a file."""
    return SourceSpec.model_validate(
        {
            "path": str(path),
            "format": format,
            "columns": columns or None,
            "special_tokens": special_tokens,
            "chat_template_kwargs": chat_template_kwargs,
        }
    )


def _adapted(raw: RawSource, kind: Kind, source: SourceSpec, audit: Audit, **how: Any) -> list[Row]:
    """Return the rows of a file with all columns; unread columns are counted in the audit."""
    audit.add_read(raw.name, len(raw.rows))
    return adapt(
        raw, kind=kind, format=source.format, columns=source.columns, keep=None, used=_COLUMNS,
        special_tokens=source.special_tokens, source_kwargs=source.chat_template_kwargs,
        audit=audit, **how,
    )  # fmt: skip


def read_responses(source: SourceSpec) -> Responses:
    """Read every row of a file of pairs, K responses, ratings or SFT rows, in order.

    Raises:
        DataError, or Problems: the columns match no known format, or rows cannot be read.
    """
    raw = load_source(source, None, 0)
    present = {column for row in raw.rows for column in row}
    present |= set(source.columns or ())
    kind: Kind | None
    if source.format is not None:
        kind = FORMATS[source.format].kind if source.format in FORMATS else None
    else:
        kind = kind_of(present)
    if kind is None:
        kind = find_format(
            present, "pair", source.format, raw.where
        ).kind  # its error lists the formats
    audit = Audit()
    rows = _adapted(raw, kind, source, audit, as_given=True, unscored=True)
    if kind == "pair":
        found = find_format(present, "pair", source.format, raw.where)
        # K = 2 responses are not a labeled pair.
        labeled = not found.sort and "responses" not in found.required
        pairs = labeled and all(len(row["responses"]) == 2 for row in rows)
        return Responses(rows, "pair" if pairs else "responses", audit)
    return Responses(_singles(rows, raw.where), "single", audit)


def _singles(rows: Sequence[Row], where: str) -> list[Row]:
    """Return rows with one response each. Raises DataError if one is a tool call."""
    problems = RowProblems(where)
    found = []
    for row in rows:
        try:
            found.append(_single(row))
        except RowError as error:
            problems.add(error, row["id"])
    problems.raise_if_any(
        len(rows),
        why="only text can be scored",
        fix="remove these rows, or end them with the answer after the call",
    )
    return found


def _single(row: Row) -> Row:
    """Return a row with one response: the last assistant turn; the turns before it are the prompt."""
    if "messages" not in row:
        return row if "responses" in row else {**row, "responses": [row["response"]]}
    messages = row["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    turn = messages[last]
    if turn.get("tool_calls"):
        raise RowError(
            "the last assistant turn has `tool_calls`; only text can be scored",
            code="data.tool-call-response",
        )
    found = {**row, "prompt": messages[:last], "responses": [turn["content"]]}
    if fields := extra_message_fields(turn):
        found["response_fields"] = [fields]
    return found


def _pair(row: Row) -> Row:
    rest = {k: v for k, v in row.items() if k not in (*_OF_RESPONSES, "rewards")}
    chosen, rejected = _written_responses(row)
    rewards = row["rewards"] or [None, None]
    return {
        **rest,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_reward": rewards[0],
        "rejected_reward": rewards[1],
    }


_OF_RESPONSES = ("responses", "response_fields")


def _written_responses(row: Row) -> list[Any]:
    """Return the responses as texts, or as messages if they have more fields than their text."""
    if not row.get("response_fields"):
        return list(row["responses"])
    return [response_message(row, number) for number in range(len(row["responses"]))]


def _responses(row: Row) -> Row:
    rest = {k: v for k, v in row.items() if k not in _OF_RESPONSES}
    return {**rest, "responses": _written_responses(row)}


def _one(row: Row) -> Row:
    rest = {k: v for k, v in row.items() if k not in (*_OF_RESPONSES, "rewards")}
    if "messages" in row:
        del rest["prompt"]
    else:
        (rest["response"],) = _written_responses(row)
    return {**rest, "reward": row["rewards"][0]}


_WRITTEN: dict[Shape, Any] = {"pair": _pair, "responses": _responses, "single": _one}


def written_pairs(rows: Sequence[Row]) -> list[Row]:
    """Return preference rows as pairs if all have two responses, else as K responses."""
    two = all(len(row["responses"]) == 2 for row in rows)
    ranked = all(row["rewards"] is None for row in rows)
    written = [_pair(row) for row in rows] if two else [_responses(row) for row in rows]
    if ranked:
        absent = ("rewards", "chosen_reward", "rejected_reward")
        written = [{k: v for k, v in row.items() if k not in absent} for row in written]
    return written


def read_pairs(source: SourceSpec, *, keep_all: bool = False) -> tuple[list[Row], Audit]:
    """Read the preference rows of a file.

    Args:
        source: the file.
        keep_all: keep every row and column, responses in their order, and responses without a reward (of a
            judge); else read them as a stage does, best first.
    """
    raw = load_source(source, None, 0)
    audit = Audit()
    return _adapted(raw, "pair", source, audit, as_given=keep_all), audit


def read_prompts(source: SourceSpec) -> tuple[list[Row], Audit]:
    """Read the prompts of a file, with its other columns.

    Raises:
        DataError: the rows already have responses.
    """
    raw = load_source(source, None, 0)
    taken = {"responses", "finished", "policies", "sampling"}
    found = sorted({column for row in raw.rows for column in row} & taken)
    if found:
        raise DataError(
            f"the rows already have {', '.join(found)}",
            code="data.has-responses",
            where=raw.where,
            why="sampled responses are written to these columns and would replace them",
            fix="use the file of prompts, or remove these columns",
        )
    audit = Audit()
    return _adapted(raw, "prompt", source, audit), audit
