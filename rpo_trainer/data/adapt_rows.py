"""Convert raw rows of any known format to internal rows.

The format is given in the recipe (`format:`) or detected from the columns; `columns:` maps other column
names to the expected ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.columns import MEANT, mapping_for, unread
from rpo_trainer.data.conversation import PROMPT_COLUMNS, holds
from rpo_trainer.data.csv_file import parse_numbers
from rpo_trainer.data.detect import find_format
from rpo_trainer.data.formats import COMMON, FORMATS, NUMBERS, PROMPT_FORMATS, Format, Raw
from rpo_trainer.data.json_columns import decode_json_columns
from rpo_trainer.data.rows import (
    Kind,
    Row,
    RowError,
    RowProblems,
    SpecialTokens,
    reward_fault,
    with_responses,
)
from rpo_trainer.data.shared_columns import (
    refuse_media,
    template_kwargs,
    tools,
    unread_system,
    without_nulls,
)
from rpo_trainer.data.sources import RawSource
from rpo_trainer.errors import DataError
from rpo_trainer.recipe.template_kwargs import COLUMN, Kwargs

# Column names that probably hold a prompt, for a prompt that no format reads.
_PROMPT_NAMES = {name.lower() for name in (*MEANT["prompt"], *PROMPT_COLUMNS)}


# ---------------------------------------------------------------- entire sources

_REWARDS = frozenset({"chosen_reward", "rejected_reward"})


def adapt(
    raw: RawSource,
    *,
    kind: Kind,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    require_rewards: bool = False,
    keep: Collection[str] | None = (),
    used: Collection[str] = (),
    as_given: bool = False,
    unscored: bool = False,
    special_tokens: SpecialTokens | None = None,
    source_kwargs: Kwargs | None = None,
    model_kwargs: Kwargs | None = None,
    audit: Audit,
) -> list[Row]:
    """Convert the rows of one source.

    Args:
        raw: rows with their positions; a row's id is its column `id` (text or integer) or
            "<source name>:<place>".
        columns: {expected name: name in the file}.
        require_rewards: every response must have a finite reward (RPO). Otherwise rewards that are not
            numbers are ignored and counted.
        keep: other columns to keep unchanged (for verifiers); None keeps all of them, and the row's own
            `source` instead of the file's name.
        used: with `keep=None`, the columns that the caller reads; the others are reported as not read.
        as_given: keep every row, with its responses in their order.
        unscored: accept sampled responses without rewards, for callers that do not use their order.
        special_tokens: how `tokenize_rows` treats the text of special tokens.
        source_kwargs, model_kwargs: variables of the chat template for all rows, and for rows of messages. A
            row's own `chat_template_kwargs` take precedence over the first, and the first over the second.

    Raises:
        DataError, or Problems: the number of rows with each fault, and the first three of each.
    """
    rows = _renamed(raw, columns or {})
    if raw.untyped:
        rows = parse_numbers(rows, NUMBERS)
    if raw.arrow:
        rows = [without_nulls(row) for row in rows]
    present = {column for row in rows for column in row}
    chosen = find_format(present, kind, format, raw.where)
    if as_given:
        chosen = replace(chosen, sort=False)
    if require_rewards and chosen.may_lack_rewards and not present & _REWARDS:
        raise DataError(
            "the rows have no rewards; RPO needs a reward for every response",
            code="data.missing-rewards",
            where=raw.where,
            fix="score the responses (`score:` in the recipe, or rpo-trainer score), map the columns with "
            "`columns: {chosen_reward: NAME, rejected_reward: NAME}`, or use `kind: dpo`",
        )
    filled = {column for row in rows for column, value in row.items() if value is not None}
    format_columns = chosen.read(filled)
    ids = [_row_id(row, raw.name, place) for row, place in zip(rows, raw.places, strict=True)]
    rows = decode_json_columns(rows, chosen.column_types(filled), ids, raw.where, audit)
    kept = present - format_columns if keep is None else set(keep) - format_columns
    missed, others = unread(
        rows,
        filled - format_columns - set(used if keep is None else kept) - _read_of_common(kind),
        {*COMMON, *chosen.ignored},
    )
    if kind == "prompt":  # responses will be sampled
        missed, others = (
            [c for c in missed if c not in _ANSWERS],
            sorted({*others, *(_ANSWERS & {*missed})}),
        )
    prompt_column = chosen.prompt_column(filled)
    if chosen.prompts and prompt_column is None:
        _check_no_prompt_unread(rows, missed, raw.where)
    # A required column that only some rows have is an error in the others.
    never_null = [c for c in chosen.required if c not in chosen.nullable]
    needed = [*never_null, *(["prompt"] if prompt_column == "prompt" else [])]
    problems = RowProblems(raw.where)
    adapted = []
    places: Sequence[int] = raw.places
    if chosen.together:
        rows, places = _together(rows, places, chosen.together)
        if raw.more and len(rows) > 1:  # the rest of the last one may not have been read
            rows, places = rows[:-1], places[:-1]
        audit.add_joined(raw.name, len(rows))
    repeated = {column for column in missed if column.lower() in _PROMPT_NAMES}
    for row, place in zip(rows, places, strict=True):
        row_id = _row_id(row, raw.name, place)
        try:
            for column in needed:
                if row.get(column) is None:
                    raise RowError(f"`{column}` is missing or null", code="data.missing-value")
            refuse_media(row)
            new = {"id": row_id, "source": raw.name, **chosen.convert(row), **tools(row)}
            for column in [*new.pop("unread", ()), *unread_system(new, row)]:
                audit.warn(f"the column `{column}` is not read: {_no_place(column)}", row_id)
            new |= template_kwargs(row, new, source_kwargs, model_kwargs)
            repeated = {column for column in repeated if _says(new, row.get(column))}
            if special_tokens is not None:
                new["special_tokens"] = special_tokens
            raw_rewards = new.get("rewards")
            _finish(new, row, chosen, require_rewards, audit)
            if as_given and row.get("judge") is not None:  # a judge leaves responses undecided
                new["rewards"] = _decided(raw_rewards, new["rewards"])
            new = {**{c: row[c] for c in row if c in kept and c != COLUMN}, **new}
            if keep is None and isinstance(row.get("source"), str):
                new["source"] = row["source"]
        except RowError as error:
            problems.add(error, row_id)
            continue
        if kind == "pair" and len(new["responses"]) < 2 and not as_given:
            audit.drop("fewer_than_two_responses", row_id)
        else:
            adapted.append(new)
    if not adapted:
        repeated = set()
    unused = [column for column in missed if column not in repeated]
    audit.add_unread(raw.name, unused, [*others, *repeated])
    problems.raise_if_any(len(rows), fix=_how_to_fix(chosen, prompt_column, missed, rows))
    sampled = "responses" in chosen.required and "sampling" in present
    if sampled and format != "ranked" and "ranks" not in present and not unscored:
        _require_scores(adapted, raw.where)
    return adapted


def _read_of_common(kind: Kind) -> set[str]:
    """Return the columns that are read in addition to those of a format."""
    read = {"id", "system", "tools", COLUMN}
    if kind in ("pair", "prompt"):
        read.add("ground_truth")
    return read | {"truth_chosen"} if kind == "pair" else read


# Columns that hold responses, or something about them.
_ANSWERS = frozenset(
    {
        "response", "responses", "completion", "completions", "chosen", "rejected", "output",
        "chosen_response", "rejected_response", "response1", "response2", "response_1", "response_2",
        "text", "answer", "answers", "canonical_solution", "reference",
    }
)  # fmt: skip


def _no_place(column: str) -> str:
    """Return why a column cannot be used in a training row."""
    if column == "system":
        return "the row is a single text without a prompt"
    if column in PROMPT_COLUMNS:
        return "the responses are full conversations that do not contain it"
    if column.startswith("input."):
        return "only `messages` and `tools` of `input` are read"
    if column == "finished":
        return "it must be a list with one boolean for each response"
    return "only `completion` and `rank` of each completion are read"


def _says(new: Row, value: object) -> bool:
    """Whether a turn of a converted row contains this text."""
    turns = new.get("messages", new.get("prompt"))
    return value is None or (
        isinstance(value, str) and isinstance(turns, list) and holds(turns, value)
    )


def _check_no_prompt_unread(rows: Sequence[Row], missed: Sequence[str], where: str) -> None:
    """Raise DataError if the prompt would be guessed although an unread column may hold it."""
    if not any(isinstance(row.get("chosen"), str) for row in rows):
        return
    likely = [c for c in missed if c.lower() in _PROMPT_NAMES]
    if likely:
        raise DataError(
            f"the column `prompt` is missing, and the columns {', '.join(missed)} are not used",
            code="data.missing-prompt",
            where=where,
            why="one of them may hold the prompt",
            fix=f"map the column that holds it: {mapping_for(['prompt'], likely)}"
            + (", or write `format: orca` for `question` with `system`" * ("question" in likely)),
        )


def _how_to_fix(
    format: Format, prompt_column: str | None, missed: Sequence[str], rows: Sequence[Row]
) -> str:
    """Return the fix, with a suggested mapping of unread columns to those that some rows lack."""
    needed = [column for column in format.required if column not in format.nullable]
    missing = [column for column in needed if any(row.get(column) is None for row in rows)]
    if format.prompts and (
        prompt_column is None or any(row.get(prompt_column) is None for row in rows)
    ):
        missing.append("prompt")
    if not (missed and missing):
        return "correct or remove these rows"
    return (
        f"correct or remove these rows, or map one of the unread columns ({', '.join(missed)}): "
        f"{mapping_for(missing, missed)} (or give --column OURS=THEIRS to a command)"
    )


def _require_scores(rows: Sequence[Row], where: str) -> None:
    if rows and all(row["rewards"] is None for row in rows):
        raise DataError(
            "the rows are sampled responses without rewards",
            code="data.unscored-responses",
            where=where,
            why="the order of sampling says nothing about which response is better",
            fix="score them (`score:` in the recipe, or rpo-trainer score); if they are ordered best first, "
            "write `format: ranked`",
        )


def _together(
    rows: Sequence[Row], places: Sequence[int], columns: Sequence[str]
) -> tuple[list[Row], list[int]]:
    """Join consecutive rows with the same prompt into one, with lists in `columns`; keep the first position.

    A column that one of the rows lacks is null in the joined row.
    """
    joined, firsts = [], []
    same = ("prompt", "system", "tools", "ground_truth", COLUMN)
    for _, run in groupby(range(len(rows)), key=lambda i: repr([rows[i].get(c) for c in same])):
        indices = list(run)
        lists = {c: [rows[i].get(c) for i in indices] for c in columns}
        joined_columns = {c: None if None in values else values for c, values in lists.items()}
        joined.append({**rows[indices[0]], **joined_columns})
        firsts.append(places[indices[0]])
    return joined, firsts


def _renamed(raw: RawSource, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    if not columns:
        return raw.rows
    known = set(COMMON) | {
        c for t in (FORMATS, PROMPT_FORMATS) for f in t.values() for c in f.required + f.optional
    }
    present = {column for row in raw.rows for column in row}
    if columns and all(a in present - known and b in known for a, b in columns.items()):
        swapped = ", ".join(f"{expected}: {in_file}" for in_file, expected in columns.items())
        raise DataError(
            "`columns` is reversed",
            code="data.reversed-columns",
            where=raw.where,
            why="its form is {expected name: name in the file}",
            fix=f"write `{{{swapped}}}`",
        )
    for expected, in_file in columns.items():
        for name, table, what in (
            (expected, known, "which is not a column of any format"),
            (in_file, present, "which is not a column of the file"),
        ):
            if name not in table:
                near = difflib.get_close_matches(name, table, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(
                    f"`columns` contains {name!r}, {what}{hint}",
                    code="data.unknown-column",
                    where=raw.where,
                    fix="write `columns: {expected name: name in the file}`",
                )
    renamed = []
    for row in raw.rows:
        rest = {name: value for name, value in row.items() if name not in columns.values()}
        new = {expected: row[in_file] for expected, in_file in columns.items() if in_file in row}
        renamed.append({**rest, **new})
    return renamed


def _row_id(row: Raw, source: str, place: int) -> str:
    own = row.get("id")
    usable = isinstance(own, str | int) and not isinstance(own, bool) and own != ""
    return str(own) if usable else f"{source}:{place}"


def _finish(new: Row, raw: Raw, format: Format, require_rewards: bool, audit: Audit) -> None:
    """Add what all formats share: ground truth, rewards, and the order (best first)."""
    if format.kind in ("sft", "rating"):
        return
    truth = raw.get("ground_truth")
    new["ground_truth"] = None if truth is None else str(truth)
    if format.kind == "prompt":
        return
    new["rewards"] = _rewards(new, require_rewards, audit)
    if format.sort and new["rewards"] is not None:
        order = sorted(range(len(new["rewards"])), key=lambda i: -new["rewards"][i])  # stable
        new |= with_responses(new, order)
    flag = raw.get("truth_chosen")
    if flag is not None and not isinstance(flag, bool):
        raise RowError("`truth_chosen` is not a boolean", code="data.wrong-type")
    is_truth = truth is not None and new["responses"][:1] == [str(truth)]
    new["truth_chosen"] = bool(flag) or is_truth


def _decided(raw: Sequence[Any] | None, rewards: list[float] | None) -> list[Any] | None:
    """Return the rewards with null for absent ones; None if they have another fault."""
    absent_only = raw is not None and all(r is None or not reward_fault(r) for r in raw)
    return list(raw) if raw is not None and absent_only else rewards


def _rewards(new: Row, required: bool, audit: Audit) -> list[float] | None:
    rewards: Sequence[Any] = new["rewards"]
    faults = [fault for fault in map(reward_fault, rewards) if fault]
    if not faults:
        return [float(reward) for reward in rewards]
    if required:
        raise RowError(
            f"a reward is {faults[0]}; RPO needs a number for every response",
            code="data.bad-reward",
        )
    if any(reward is not None for reward in rewards):
        audit.warn("unusable_rewards", new["id"])
    return None
