"""Raw rows of any known format → internal rows.

A format is named in the recipe (`format:`) or found from the columns; `columns:` renames what is
called otherwise.
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

# Names under which a prompt may stand that is not read; `source` columns and the like are not.
_PROMPT_NAMES = {name.lower() for name in (*MEANT["prompt"], *PROMPT_COLUMNS)}


# ---------------------------------------------------------------- whole sources

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
    """Internal rows of one source.

    Args:
        raw: rows with their places; a row's id is its own `id` (text or whole number) or
            "<source name>:<place>".
        columns: {our name: name in the file}.
        require_rewards: every response must have a finite reward (RPO). Otherwise rewards that
            are no numbers are left out and counted.
        keep: other columns that stay in the rows as they are (a verifier's); None: all others, and the row's
            own `source` in place of the file's name.
        used: with `keep=None`, those of them that the caller reads; the others are counted as not read.
        as_given: every row stays, with its responses in their order.
        unscored: sampled responses without rewards are taken too: nobody reads their order.
        special_tokens: how text of special tokens is to be read, for `tokenize_rows`.
        source_kwargs, model_kwargs: variables of the chat template for all rows, and for those of
            messages; a row's own `chat_template_kwargs` go before the first, and these before the second.

    Raises:
        DataError, or Problems: how many rows have which fault, and the first three of each.
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
            "no row has rewards, and RPO needs one for every response",
            code="data.missing-rewards",
            where=raw.where,
            why="the gap between the rewards is what RPO learns, and no reward is made up",
            fix="score the responses (`score:` in the recipe, or rpo-trainer score), name their columns "
            "with `columns: {chosen_reward: theirs, rejected_reward: theirs}`, or use kind: dpo",
        )
    filled = {column for row in rows for column, value in row.items() if value is not None}
    own = chosen.read(filled)
    ids = [_row_id(row, raw.name, place) for row, place in zip(rows, raw.places, strict=True)]
    rows = decode_json_columns(rows, chosen.column_types(filled), ids, raw.where, audit)
    kept = present - own if keep is None else set(keep) - own
    missed, others = unread(
        rows,
        filled - own - set(used if keep is None else kept) - _read_of_common(kind),
        {*COMMON, *chosen.ignored},
    )
    if kind == "prompt":  # responses are not missed where they are to be sampled
        missed, others = (
            [c for c in missed if c not in _ANSWERS],
            sorted({*others, *(_ANSWERS & {*missed})}),
        )
    asked = chosen.prompt_column(filled)
    if chosen.prompts and asked is None:
        _check_no_prompt_unread(rows, missed, raw.where)
    # A column that some rows have is one that all rows need, where the rows make no sense without.
    never_null = [c for c in chosen.required if c not in chosen.nullable]
    needed = [*never_null, *(["prompt"] if asked == "prompt" else [])]
    problems = RowProblems(raw.where)
    adapted = []
    places: Sequence[int] = raw.places
    if chosen.together:
        rows, places = _together(rows, places, chosen.together)
        audit.add_joined(raw.name, len(rows))
    repeated = {column for column in missed if column.lower() in _PROMPT_NAMES}
    for row, place in zip(rows, places, strict=True):
        row_id = _row_id(row, raw.name, place)
        try:
            for column in needed:
                if row.get(column) is None:
                    raise RowError(f"`{column}` is absent or null", code="data.missing-value")
            refuse_media(row)
            new = {"id": row_id, "source": raw.name, **chosen.convert(row), **tools(row)}
            for column in [*new.pop("unread", ()), *unread_system(new, row)]:
                audit.warn(f"the column `{column}` is not read: {_no_place(column)}", row_id)
            new |= template_kwargs(row, new, source_kwargs, model_kwargs)
            repeated = {column for column in repeated if _says(new, row.get(column))}
            if special_tokens is not None:
                new["special_tokens"] = special_tokens
            given = new.get("rewards")
            _finish(new, row, chosen, require_rewards, audit)
            if as_given and row.get("judge") is not None:  # a judge leaves responses undecided
                new["rewards"] = _decided(given, new["rewards"])
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
    problems.raise_if_any(len(rows), fix=_how_to_fix(chosen, asked, missed, rows))
    sampled = "responses" in chosen.required and "sampling" in present
    if sampled and format != "ranked" and "ranks" not in present and not unscored:
        _require_scores(adapted, raw.where)
    return adapted


def _read_of_common(kind: Kind) -> set[str]:
    """The columns that are read beside those of a format."""
    read = {"id", "system", "tools", COLUMN}
    if kind in ("pair", "prompt"):
        read.add("ground_truth")
    return read | {"truth_chosen"} if kind == "pair" else read


# Columns with responses and what is said of them.
_ANSWERS = frozenset(
    {
        "response", "responses", "completion", "completions", "chosen", "rejected", "output",
        "chosen_response", "rejected_response", "response1", "response2", "response_1", "response_2",
        "text", "answer", "answers", "canonical_solution", "reference",
    }
)  # fmt: skip


def _no_place(column: str) -> str:
    """Why a column has no place in the row that is trained."""
    if column == "system":
        return "the row is one text without a prompt, and a system turn goes before a prompt"
    if column in PROMPT_COLUMNS:
        return "the responses are whole conversations that do not contain it"
    if column.startswith("input."):
        return "`input` has `messages` and `tools`"
    if column == "finished":
        return "it is a list with one true or false a response"
    return "each completion has a `completion` and its `rank`"


def _says(new: Row, value: object) -> bool:
    """Whether the conversation of a converted row has a turn with this text."""
    turns = new.get("messages", new.get("prompt"))
    return value is None or (
        isinstance(value, str) and isinstance(turns, list) and holds(turns, value)
    )


def _check_no_prompt_unread(rows: Sequence[Row], missed: Sequence[str], where: str) -> None:
    """Raises DataError where the prompt would be guessed from texts beside a column that may hold it."""
    if not any(isinstance(row.get("chosen"), str) for row in rows):
        return
    likely = [c for c in missed if c.lower() in _PROMPT_NAMES]
    if likely:
        raise DataError(
            f"there is no `prompt`, and the columns {', '.join(missed)} are not read",
            code="data.missing-prompt",
            where=where,
            why="one of them may hold the prompt; words that both responses begin with are not taken for it",
            fix=f"name its column: {mapping_for(['prompt'], likely)}"
            + (
                ", or `format: orca` for a question with its system prompt" * ("question" in likely)
            ),
        )


def _how_to_fix(
    format: Format, asked: str | None, missed: Sequence[str], rows: Sequence[Row]
) -> str:
    """With a mapping of unread columns to those that some rows lack."""
    needed = [column for column in format.required if column not in format.nullable]
    lacking = [column for column in needed if any(row.get(column) is None for row in rows)]
    if format.prompts and (asked is None or any(row.get(asked) is None for row in rows)):
        lacking.append("prompt")
    if not (missed and lacking):
        return "correct or remove these rows"
    return (
        f"correct or remove these rows; the columns {', '.join(missed)} are not read: name the one that "
        f"is meant, {mapping_for(lacking, missed)}"
    )


def _require_scores(rows: Sequence[Row], where: str) -> None:
    if rows and all(row["rewards"] is None for row in rows):
        raise DataError(
            "the responses are sampled, and have no rewards",
            code="data.unscored-responses",
            where=where,
            why="the order in which they were sampled says nothing of which is better",
            fix="score them (`score:` in the recipe, or rpo-trainer score); where they stand best first, "
            "name the format: ranked",
        )


def _together(
    rows: Sequence[Row], places: Sequence[int], columns: Sequence[str]
) -> tuple[list[Row], list[int]]:
    """One row for each run of rows with the same prompt, with lists in `columns`; the first's place.

    A column that one of them has not is null, as in a row of its own.
    """
    joined, firsts = [], []
    same = ("prompt", "system", "tools", "ground_truth", COLUMN)
    for _, run in groupby(range(len(rows)), key=lambda i: repr([rows[i].get(c) for c in same])):
        alike = list(run)
        lists = {c: [rows[i].get(c) for i in alike] for c in columns}
        whole = {c: None if None in values else values for c, values in lists.items()}
        joined.append({**rows[alike[0]], **whole})
        firsts.append(places[alike[0]])
    return joined, firsts


def _renamed(raw: RawSource, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    if not columns:
        return raw.rows
    known = set(COMMON) | {
        c for t in (FORMATS, PROMPT_FORMATS) for f in t.values() for c in f.required + f.optional
    }
    present = {column for row in raw.rows for column in row}
    if columns and all(a in present - known and b in known for a, b in columns.items()):
        turned = ", ".join(f"{ours}: {theirs}" for theirs, ours in columns.items())
        raise DataError(
            "`columns` is the wrong way round",
            code="data.reversed-columns",
            where=raw.where,
            why="it is {our name: name in the file}",
            fix=f"write `{{{turned}}}`",
        )
    for ours, theirs in columns.items():
        for name, table, what in (
            (ours, known, "we know"),
            (theirs, present, "there is"),
        ):
            if name not in table:
                near = difflib.get_close_matches(name, table, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(
                    f"`columns` names {name!r}, and {what} no such column{hint}",
                    code="data.unknown-column",
                    where=raw.where,
                    why="it would rename nothing",
                    fix="`columns` is {our name: name in the file}",
                )
    renamed = []
    for row in raw.rows:
        rest = {name: value for name, value in row.items() if name not in columns.values()}
        new = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        renamed.append({**rest, **new})
    return renamed


def _row_id(row: Raw, source: str, place: int) -> str:
    own = row.get("id")
    usable = isinstance(own, str | int) and not isinstance(own, bool) and own != ""
    return str(own) if usable else f"{source}:{place}"


def _finish(new: Row, raw: Raw, format: Format, require_rewards: bool, audit: Audit) -> None:
    """Adds what does not depend on the format: ground truth, rewards, the order best first."""
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
        raise RowError("`truth_chosen` is neither true nor false", code="data.wrong-type")
    is_truth = truth is not None and new["responses"][:1] == [str(truth)]
    new["truth_chosen"] = bool(flag) or is_truth


def _decided(given: Sequence[Any] | None, found: list[float] | None) -> list[Any] | None:
    """The rewards with null for those that are absent; None where another fault is in them."""
    absent_only = given is not None and all(r is None or not reward_fault(r) for r in given)
    return list(given) if given is not None and absent_only else found


def _rewards(new: Row, required: bool, audit: Audit) -> list[float] | None:
    rewards: Sequence[Any] = new["rewards"]
    faults = [fault for fault in map(reward_fault, rewards) if fault]
    if not faults:
        return [float(reward) for reward in rewards]
    if required:
        raise RowError(
            f"a reward is {faults[0]}, and RPO needs one for every response", code="data.bad-reward"
        )
    if any(reward is not None for reward in rewards):
        audit.warn("unusable_rewards", new["id"])
    return None
