"""From a recipe's sources, or from a raw data set, to rows and tokenised examples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rpo_trainer.data.adapters import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.filters import filter_rows
from rpo_trainer.data.mix import mix_sources
from rpo_trainer.data.rows import Kind, Row, raise_all
from rpo_trainer.data.sources import RawSource, load_source
from rpo_trainer.data.tokenize import TOKENISED, Truncation, tokenize_rows
from rpo_trainer.errors import DataError, Problems

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
    audit: Audit,
    seed: int,
) -> list[Row]:
    """Internal rows of all sources, mixed by their weights; nothing is filtered yet.

    Args:
        kind: `sft`, `pair` (two or more responses a prompt) or `prompt`.
        base_dir: relative paths start here.
        require_rewards: every response must have a finite reward (RPO).
        seed: of the mixture's sample, and of tasks without a seed of their own.

    Raises:
        DataError, or Problems: the faults of all sources at once.
    """
    errors: list[DataError] = []
    named: list[tuple[str, list[Row]]] = []
    for spec in sources:
        try:
            raw = load_source(spec, base_dir, seed)
            raw.name = _unused(raw.name, [name for name, _ in named])
            audit.add_read(raw.name, len(raw.rows))
            _first_rows(raw, spec.max_rows, audit)
            rows = adapt(
                raw,
                kind=kind,
                format=spec.format,
                columns=spec.columns,
                require_rewards=require_rewards,
                audit=audit,
            )
            named.append((raw.name, rows))
        except DataError as error:
            errors.append(error)
        except Problems as found:
            errors += [error for error in found.problems if isinstance(error, DataError)]
    raise_all(errors)
    rows = mix_sources(named, [spec.weight for spec in sources], seed=seed, audit=audit)
    _observe(rows, kind, audit)
    return rows


def prepare_dataset(
    dataset: datasets.Dataset | Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Literal["sft", "pair"],
    max_length: int,
    truncation: Truncation = "drop",
    require_rewards: bool = False,
    audit: Audit | None = None,
) -> datasets.Dataset:
    """Tokenised examples of raw rows in any known format; tokenised ones are returned as they are.

    Args:
        dataset: a map-style `datasets.Dataset`, or a list of rows.
        audit: counts what is dropped; None: the counts are logged.

    Raises:
        DataError, Problems, ModelError: as `load_rows`, `filter_rows` and `tokenize_rows`.
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        if set(TOKENISED) <= set(dataset.column_names):
            return dataset
        raw_rows = dataset.to_list()
    elif isinstance(dataset, Sequence):
        raw_rows = list(dataset)
    else:
        raise DataError(
            f"a {type(dataset).__name__} cannot be trained on",
            fix="give a datasets.Dataset (one split, not streamed) or a list of rows",
        )
    if not raw_rows:
        raise DataError("the data set has no rows")
    if isinstance(dataset, Sequence) and set(TOKENISED) <= set(raw_rows[0]):
        return datasets.Dataset.from_list(raw_rows)
    counted = audit or Audit()
    raw = RawSource("dataset", raw_rows, list(range(len(raw_rows))), "dataset")
    counted.add_read(raw.name, len(raw_rows))
    rows = adapt(raw, kind=kind, require_rewards=require_rewards, audit=counted)
    _observe(rows, kind, counted)
    if kind == "pair":
        rows = filter_rows(rows, None, counted)
    tokenised = tokenize_rows(
        rows, tokenizer, kind=kind, max_length=max_length, truncation=truncation, audit=counted
    )
    if audit is None:
        level = logging.WARNING if counted.dropped else logging.INFO
        for line in counted.summary_lines():
            logger.log(level, "%s", line)
    return tokenised


def _observe(rows: Sequence[Row], kind: Kind, audit: Audit) -> None:
    audit.observe_prompts(rows)
    if kind == "pair":
        audit.observe_pairs(rows)


def _first_rows(raw: RawSource, limit: int | None, audit: Audit) -> None:
    if limit is not None:
        audit.leave_out(raw.name, max(0, len(raw.rows) - limit))
        raw.rows, raw.places = raw.rows[:limit], raw.places[:limit]


def _unused(name: str, names: Sequence[str]) -> str:
    number = 2
    free = name
    while free in names:
        free, number = f"{name} ({number})", number + 1
    return free
