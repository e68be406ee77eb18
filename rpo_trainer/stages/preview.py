"""Training examples token by token, colored by whether each token is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from rich.text import Text

from rpo_trainer.data import Audit
from rpo_trainer.data.counts import DROPS
from rpo_trainer.data.rows import row_texts
from rpo_trainer.data.sources import FirstRows
from rpo_trainer.data.token_view import (
    LOST,
    PROMPT,
    TokenView,
    trained_styles,
    visible,
    warnings_of,
)
from rpo_trainer.errors import DataError, Problems, RecipeError
from rpo_trainer.recipe import LoadedRecipe, Stage
from rpo_trainer.recipe.template_kwargs import COLUMN, kwargs_key
from rpo_trainer.stages.error_places import errors_located_in
from rpo_trainer.stages.inputs import needs_policy, tokenize_stage
from rpo_trainer.stages.prepare import StagePreparer

Row = dict[str, Any]

_LONG = 2**30  # tokens: longer than any text
_FIRST = 100  # rows of each source


def preview(
    loaded: LoadedRecipe,
    count: int,
    *,
    stage: str | None = None,
    colors: bool = True,
    every_row: bool = False,
) -> Iterator[Text]:
    """Show evenly spaced examples of each stage, and the longest one.

    They are selected from the first 100 rows of each source, or the first `count` if that is more: the rest
    of a file is not read, and faults in it are not found.

    Args:
        count: examples per stage, in addition to the longest.
        stage: name of the only stage to show; None: all. Data shared with an earlier stage is shown once.
        colors: False: mark tokens in the text instead: `[trained]`, `⟨beyond max_length⟩`.
        every_row: read all rows, and select from them.

    Raises:
        RecipeError: no such stage.
        DataError, ModelError, Problems: the rows that are read, or the tokenizer, cannot be read.
    """
    with errors_located_in(loaded.origins):
        shown = _Preview(loaded, colors, None if every_row else max(_FIRST, count))
    names = [each.name for each in shown.preparer.stages]
    if stage is not None and stage not in names:
        raise RecipeError(
            f"there is no stage {stage!r}",
            code="option.unknown-stage",
            where=str(loaded.path),
            why="the rounds of a repeated stage are numbered (rpo-1, rpo-2)",
            fix=f"give one of: {', '.join(names)}",
        )
    yield shown.view.legend()
    for each in shown.preparer.stages:
        if stage in (None, each.name):
            with errors_located_in(loaded.origins, f"stages.{each.name}"):
                yield from shown.stage(each, count)


class _Preview:
    def __init__(self, loaded: LoadedRecipe, colors: bool, first: int | None) -> None:
        self.first = first  # rows of each source that are read; None: all
        self.preparer = StagePreparer(loaded)
        self.view = TokenView(self.preparer.tokenizer, colors)
        self._seen: dict[str, str] = {}

    def stage(self, stage: Stage, count: int) -> Iterator[Text]:
        """Yield the heading and the examples of a stage."""
        yield Text(f"\n{stage.name} ({stage.kind})", "bold")
        data = stage.data.model_dump_json() + stage.kind + str(stage.max_length)
        if (before := self._seen.setdefault(data, stage.name)) != stage.name:
            yield Text(f"same data as {before}")
            return
        if stage.data.responses_from is not None:
            yield Text(f"uses the responses of stage {stage.data.responses_from}")
            return
        rows, named = self._rows(stage)
        if needs_policy(stage.data):
            yield Text(f"{named.format('prompts')}; responses are sampled when the stage runs")
            for row, note in _spread(rows, count):
                yield from self._prompt(row, note)
        else:
            limit = f"max_length {stage.max_length:,} ({stage.truncation})"
            yield Text(f"{named.format('rows')}, {limit}")
            for row, note in _spread(rows, count):
                yield from self._example(stage, row, note)

    def _rows(self, stage: Stage) -> tuple[list[Row], str]:
        """Return the rows to select from, and what they are, with a place for "rows" or "prompts"."""
        if self.first is not None:
            first = FirstRows(self.first)
            few = StagePreparer(self.preparer.loaded, first=first)
            # A setting may need more rows than the first, such as a replay: then all are read.
            with suppress(DataError, Problems):
                rows = few.rows_to_show(stage)
                if first.more:
                    return rows, f"{{}} from the first {first.count:,} of each source"
                return rows, f"{len(rows):,} {{}}"
        rows = self.preparer.rows_to_show(stage)
        return rows, f"{len(rows):,} {{}}"

    def _prompt(self, row: Row, note: str) -> Iterator[Text]:
        (ids,) = self.preparer.prompt_ids([row])
        yield Text(_title(row, note, len(ids)), "bold")
        yield self.view.tokens(ids, [PROMPT] * len(ids))

    def _example(self, stage: Stage, row: Row, note: str) -> Iterator[Text]:
        untruncated, reason, warnings = self._tokenized(
            stage.model_copy(update={"max_length": _LONG}), row
        )
        if untruncated is None:
            yield Text(f"\nrow {row['id']}{note}: dropped: {reason}", "bold red")
            yield from (Text(visible(text)) for text in row_texts(row))
            return
        example, reason, _ = self._tokenized(stage, row)
        prompt = untruncated["prompt_ids"]
        yield Text(_title(row, note, len(prompt)), "bold")
        yield from (Text(f"warning: {text}", "yellow") for text in warnings)
        if example is None:
            yield Text(f"dropped: {reason}", "bold red")
        yield self.view.tokens(prompt, _lost_after([PROMPT] * len(prompt), stage.max_length))
        room = stage.max_length - len(prompt)
        for number, ids in enumerate(untruncated["response_ids"]):
            mask = untruncated["response_mask"][number]
            yield Text(_head(untruncated, number, ids, mask, room), "bold")
            yield self.view.tokens(ids, _lost_after(trained_styles(mask), room))

    def _tokenized(self, stage: Stage, row: Row) -> tuple[Row | None, str, list[str]]:
        """Return the example, or None and the reason, and the warnings about it."""
        audit = Audit()
        try:
            (example,) = tokenize_stage(stage, [row], self.preparer.tokenizer, audit)
            return example, "", warnings_of(audit)
        except DataError:
            if not audit.dropped:  # an error, not a dropped row
                raise
            return None, ", ".join(DROPS[name] for name in audit.dropped), []


def _spread(rows: Sequence[Row], count: int) -> Iterator[tuple[Row, str]]:
    """Yield `count` evenly spaced rows, then the longest with a note, if it is not among them."""
    count = min(count, len(rows))
    chosen = [number * len(rows) // count for number in range(count)] if count else []
    for number in chosen:
        yield rows[number], ""
    longest = max(range(len(rows)), key=lambda i: sum(map(len, row_texts(rows[i]))), default=None)
    if longest is not None and longest not in chosen:
        yield rows[longest], " (the longest)"


def _title(row: Row, note: str, tokens: int) -> str:
    """Return the heading of a row: its id, prompt length and chat template variables."""
    variables = f", {COLUMN} {kwargs_key(row[COLUMN])}" if row.get(COLUMN) else ""
    return f"\nrow {row['id']}{note}: prompt of {tokens:,} tokens{visible(variables)}"


def _head(example: Row, number: int, ids: Sequence[int], mask: Sequence[int], room: int) -> str:
    title = f"{_name(example, number)}: {len(ids):,} tokens, {sum(mask):,} trained"
    if len(ids) > room:
        title += f", {len(ids) - max(room, 0):,} beyond max_length"
    if example["rewards"] is not None:
        title += f", reward {example['rewards'][number]:g}"
    if example.get("attributes"):
        title += f", ratings {example['attributes']}"
    return title


def _name(example: Row, number: int) -> str:
    """Return the name of a response: the first of two is the chosen one."""
    count = len(example["response_ids"])
    if count == 2:
        return ("chosen response", "rejected response")[number]
    return "response" if count == 1 else f"response {number + 1}"


def _lost_after(styles: list[str], room: int) -> list[str]:
    room = max(room, 0)
    return [*styles[:room], *[LOST] * (len(styles) - room)]
