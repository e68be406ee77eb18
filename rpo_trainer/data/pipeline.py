"""From the sources of a recipe, or from a raw data set, to rows and tokenized examples."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import MAX_ROWS
from rpo_trainer.data.duplicates import Dedup
from rpo_trainer.data.example_table import example_dataset
from rpo_trainer.data.filters import drop_duplicates, filter_rows
from rpo_trainer.data.mix import mix_sources
from rpo_trainer.data.ratings import rating_targets
from rpo_trainer.data.rows import Kind, Row, SpecialTokens, Truncation, raise_all
from rpo_trainer.data.sources import FirstRows, RawSource, load_source
from rpo_trainer.data.template_variables import check_kwargs
from rpo_trainer.data.tokenize import TOKENIZED, released, tokenize_rows
from rpo_trainer.errors import DataError, Problems
from rpo_trainer.recipe.template_kwargs import COLUMN, Kwargs

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from rpo_trainer.recipe.schema import SourceSpec

logger = logging.getLogger(__name__)


def load_rows(
    sources: Sequence[SourceSpec],
    *,
    kind: Kind,
    base_dir: Path | None,
    require_rewards: bool = False,
    dedup: Dedup | None = None,
    keep: Collection[str] = (),
    unscored: bool = False,
    first: FirstRows | None = None,
    audit: Audit,
    seed: int,
) -> list[Row]:
    """Return the internal rows of all sources, mixed by weight, without filtering.

    Args:
        kind: `sft`, `pair` (two or more responses per prompt), `rating` or `prompt`.
        base_dir: base of relative paths.
        require_rewards: every response must have a finite reward (RPO).
        dedup: keep the first row of each prompt, compared exactly or normalized; None keeps all.
        keep: other columns to keep unchanged (for verifiers).
        unscored: accept sampled responses without rewards, which will be scored later.
        first: read only the first rows of each source, and note whether there are more; None: all.
        seed: seed of the mixture, and of tasks without their own seed.

    Raises:
        DataError, or Problems: the errors of all sources together.
    """
    errors: list[DataError] = []
    named: list[tuple[str, list[Row]]] = []
    for spec in sources:
        try:
            raw = _read(spec, base_dir, seed, first)
            raw.name = _unused(raw.name, [name for name, _ in named])
            audit.add_read(raw.name, len(raw.rows))
            _first_rows(raw, spec.max_rows, audit)
            rows = adapt(
                raw,
                kind=kind,
                format=spec.format,
                columns=spec.columns,
                require_rewards=require_rewards,
                keep=keep,
                unscored=unscored,
                special_tokens=spec.special_tokens,
                source_kwargs=spec.chat_template_kwargs,
                model_kwargs=spec.model_kwargs,
                audit=audit,
            )
            named.append((raw.name, rows))
        except DataError as error:
            errors.append(error)
        except Problems as found:
            errors += [error for error in found.problems if isinstance(error, DataError)]
    raise_all(errors)
    if dedup is not None:
        named = _without_duplicates(named, dedup, audit)
    rows = mix_sources(named, [spec.weight for spec in sources], seed=seed, audit=audit)
    _observe(rows, kind, audit)
    return rows


def prepare_dataset(
    dataset: datasets.Dataset | Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Literal["sft", "pair", "rating"],
    max_length: int,
    truncation: Truncation = "drop",
    require_rewards: bool = False,
    attributes: Sequence[str] = (),
    rating_range: tuple[float, float] | None = None,
    special_tokens: SpecialTokens | None = None,
    chat_template_kwargs: Kwargs | None = None,
    all_end: bool = False,
    audit: Audit | None = None,
    folder: Path | None = None,
    label: str = "",
) -> datasets.Dataset:
    """Tokenize raw rows in any known format. Tokenized examples are returned unchanged.

    Args:
        dataset: a map-style `datasets.Dataset`, a list of rows, or any object with `len()` and rows by index,
            such as a `torch.utils.data.Dataset`.
        attributes, rating_range: for rating rows, see `rating_targets`.
        special_tokens: how to read the text of special tokens in the rows: `text` as plain text, `parse` as
            the tokens, for rows that were rendered by a chat template before. None means `text`, with a
            warning if rows contain such text.
        chat_template_kwargs: variables of the chat template for all rows of messages. A row's column of this
            name takes precedence, key by key.
        all_end: see `tokenize_rows`.
        audit: counts rows and warnings; None: the counts are logged.
        folder, label: see `tokenize_rows`.

    Raises:
        DataError, Problems, ModelError: as `load_rows`, `filter_rows` and `tokenize_rows`.
        RecipeError: `chat_template_kwargs` that the chat template does not read.
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        if set(TOKENIZED) <= set(dataset.column_names):
            return dataset
        raw_rows = dataset.to_list()
    else:
        raw_rows = rows_by_number(dataset)
    if not raw_rows:
        raise DataError(
            "the data set has no rows",
            code="data.no-rows",
            fix="check the split or the filter that produced it",
        )
    if not isinstance(dataset, datasets.Dataset) and set(TOKENIZED) <= set(raw_rows[0]):
        return example_dataset(raw_rows)
    check_kwargs(chat_template_kwargs, tokenizer, COLUMN)
    counted = audit or Audit()
    arrow = isinstance(dataset, datasets.Dataset)
    raw = RawSource("dataset", raw_rows, list(range(len(raw_rows))), "dataset", arrow)
    counted.add_read(raw.name, len(raw_rows))
    rows = adapt(
        raw,
        kind=kind,
        require_rewards=require_rewards,
        special_tokens=special_tokens,
        model_kwargs=chat_template_kwargs,
        audit=counted,
    )
    _observe(rows, kind, counted)
    if kind == "pair":
        rows = filter_rows(rows, None, counted)
    elif kind == "rating":
        rows = rating_targets(rows, attributes, rating_range=rating_range, audit=counted)
    tokenized = tokenize_rows(
        released(rows),
        tokenizer,
        kind=kind,
        max_length=max_length,
        truncation=truncation,
        audit=counted,
        all_end=all_end,
        folder=folder,
        label=label,
    )
    if audit is None:
        counted.log(logger, "the data set")
    return tokenized


def _without_duplicates(
    named: Sequence[tuple[str, list[Row]]], dedup: Dedup, audit: Audit
) -> list[tuple[str, list[Row]]]:
    """Remove rows whose prompt occurs earlier in the same or an earlier source."""
    kept = {
        id(row) for row in drop_duplicates([r for _, rows in named for r in rows], dedup, audit)
    }
    return [(name, [row for row in rows if id(row) in kept]) for name, rows in named]


def rows_by_number(dataset: Any) -> list[dict[str, Any]]:
    """Return the rows of a list or of a map-style data set.

    Raises:
        DataError: the data set has no rows by number.
    """
    if isinstance(dataset, Sequence):
        return list(dataset)
    what = f"a {type(dataset).__name__} is not supported as a data set"
    if any(kind.__name__ == "IterableDataset" for kind in type(dataset).__mro__) or not hasattr(
        dataset, "__getitem__"
    ):
        raise DataError(
            what,
            code="data.unsupported-dataset",
            why="shuffling and resuming need rows by index, which a stream does not have",
            fix="convert it to a list, or to a data set on disk with datasets.Dataset.from_generator(...)",
        )
    if isinstance(dataset, Mapping) or not hasattr(dataset, "__len__"):
        raise DataError(
            what,
            code="data.unsupported-dataset",
            why="rows are read by index, from 0 to `len()` - 1",
            fix="pass a datasets.Dataset (one split, not streaming), a list of rows, or a data set with "
            "`len()` and rows by index",
        )
    rows = [dataset[number] for number in range(len(dataset))]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"row {number} of the {type(dataset).__name__} is a {type(row).__name__}",
                code="data.row-not-object",
                fix="return rows as dicts in one of the known formats, for example "
                '{"prompt": ..., "chosen": ..., "rejected": ...}',
            )
    return rows


def _observe(rows: Sequence[Row], kind: Kind, audit: Audit) -> None:
    if kind != "rating":  # each response to a prompt has its own row
        audit.observe_prompts(rows)
    if kind == "pair":
        audit.observe_pairs(rows)


def _read(spec: SourceSpec, base_dir: Path | None, seed: int, first: FirstRows | None) -> RawSource:
    if first is None:
        # With `max_rows` too: the audit counts the rows that are left out.
        return load_source(spec, base_dir, seed)
    enough = spec.max_rows is not None and spec.max_rows <= first.count
    raw = load_source(spec, base_dir, seed, spec.max_rows if enough else first.count)
    raw.more = raw.more and not enough
    first.more = first.more or raw.more
    return raw


def _first_rows(raw: RawSource, limit: int | None, audit: Audit) -> None:
    if limit is not None:
        audit.leave_out(MAX_ROWS, raw.name, max(0, len(raw.rows) - limit))
        raw.rows, raw.places = raw.rows[:limit], raw.places[:limit]


def _unused(name: str, names: Sequence[str]) -> str:
    number = 2
    free = name
    while free in names:
        free, number = f"{name} ({number})", number + 1
    return free
