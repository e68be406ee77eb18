"""What tokenized examples ask of a model: rows of the embedding table, positions, end tokens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from rpo_trainer.data import end_token_ids
from rpo_trainer.errors import DataError, ModelError
from rpo_trainer.models.preload_checks import positions_of
from rpo_trainer.models.sharding import num_rows
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.runtime.distributed import is_main
from rpo_trainer.step.attention_reach import rotary_limit
from rpo_trainer.step.batch import Layout
from rpo_trainer.trainers.examples import Examples

logger = logging.getLogger(__name__)

# Of trained spans, or of a token's occurrences; rarer ones may be where a response was cut.
_SHARE = 0.01
_OFFSETS = 8  # rows that a table may have before its first position: 2 in OPT and BART
_ROWS = 256  # of a data set that are read at once


def check_fit(
    model: nn.Module, examples: Examples | None, name: str, *, whose: str = "the model"
) -> None:
    """Raises ModelError where examples have tokens or positions that a model has no weights for.

    Every response restarts at its prompt's length, so an example is as long as its prompt and its longest
    response, however rows are packed. Where positions are computed (rotary, ALiBi) or a model has none, there
    is only a WARNING beyond the length that it was trained with.
    """
    if examples is None or not len(examples):
        return
    inner = transformers_model(model)
    largest, smallest, longest = _extremes(examples)
    rows = num_rows(inner.get_input_embeddings().weight)
    if largest >= rows or smallest < 0:
        raise ModelError(
            f"the {name} data has token {largest if largest >= rows else smallest}, {whose} has {rows} "
            "embeddings",
            code="model.missing-embeddings",
            details={
                "data": name,
                "token": largest if largest >= rows else smallest,
                "embeddings": rows,
            },
            why="a token outside of the table cannot be embedded",
            fix="use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) "
            "before the model is passed",
        )
    limit = positions_of(inner.config)
    if limit is None or longest <= limit:
        return
    if not _has_table(inner, limit):
        logger.warning(
            "the longest example of the %s data has %d tokens; %s was trained for %d positions; later "
            "positions are extrapolated",
            name, longest, whose, limit,
        )  # fmt: skip
        return
    raise ModelError(
        f"the longest example of the {name} data has {longest} tokens, {whose} has {limit} positions",
        code="model.missing-positions",
        details={"data": name, "model": whose, "tokens": longest, "positions": limit},
        why="there are no weights for positions beyond its table",
        fix=f"set max_length={limit}, or less",
    )


def _has_table(inner: Any, positions: int) -> bool:
    """Whether a model looks its positions up in a table: an embedding or a buffer of about as many rows."""
    parts = list(inner.modules())
    if any("Rotary" in type(part).__name__ for part in parts):
        return False
    tokens = (inner.get_input_embeddings(), inner.get_output_embeddings())
    for part in parts:
        grows = hasattr(part, "make_weights")
        if grows or any(part is each for each in tokens):
            continue
        sizes = [len(b) for b in part.buffers(recurse=False) if b.dim() == 2]
        if isinstance(part, nn.Embedding):
            sizes.append(part.num_embeddings)
        if any(positions <= size <= positions + _OFFSETS for size in sizes):
            return True
    return False


def check_all_fit(model: nn.Module, train: Any, evaluation: Any) -> None:
    """`check_fit` of a trainer's data sets; `evaluation` is one, several by name, or None."""
    check_fit(model, train, "train")
    several = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    for name, examples in several.items():
        check_fit(model, examples, f"eval_{name}" if name else "eval")


def trained_ends(examples: Examples | None, tokenizer: Any) -> list[int]:
    """The control tokens that trained spans end with, the most frequent first.

    Tokens that training continues after, such as the end of an analysis before its answer, are left out:
    a model that stopped there would not finish. So is what a cut response or a mask with holes ends with.
    """
    if examples is None or not len(examples) or tokenizer is None:
        return []
    known = _known_ends(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    candidates = np.array(sorted(known | {t for t, each in added.items() if each.special}))
    ends: Counter[int] = Counter()
    inside: Counter[int] = Counter()
    spans = 0
    for ids, mask, last in _responses(examples):
        trained = mask == 1
        followed = trained & np.append(trained[1:], False) & ~last
        final = trained & ~followed
        spans += int(final.sum())
        for chosen, counts in ((final, ends), (followed, inside)):
            tokens = ids[chosen]
            found, times = np.unique(tokens[np.isin(tokens, candidates)], return_counts=True)
            counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    often = [t for t, n in ends.most_common() if t in known or n >= _SHARE * spans]
    continued = [t for t in often if inside[t] > _SHARE * (inside[t] + ends[t])]
    if (unsaid := [t for t in continued if t in known]) and is_main():
        logger.warning(
            "%s: not added to the saved eos_token_id, because training continues after it in a response",
            ", ".join(
                f"{tokenizer.convert_ids_to_tokens(t)!r} ends {ends[t]} trained spans and is in {inside[t]}"
                for t in unsaid
            ),
        )  # fmt: skip
    return [t for t in often if t not in continued]


def _known_ends(tokenizer: Any) -> set[int]:
    if getattr(tokenizer, "is_fast", False):
        return set(end_token_ids(tokenizer))
    end = getattr(tokenizer, "eos_token_id", None)
    return set() if end is None else {int(end)}


def _responses(examples: Examples) -> Iterator[tuple[Any, Any, Any]]:
    """Of some responses after each other: token ids, masks, and whether a token is a response's last."""
    rows = examples.rows
    if not hasattr(rows, "with_format"):
        for row in rows:
            for ids, mask in zip(row["response_ids"], row["response_mask"], strict=True):
                if 0 < len(ids) == len(mask):  # the collator refuses others, and names the row
                    last = np.arange(len(ids)) == len(ids) - 1
                    yield np.asarray(ids), np.asarray(mask, dtype=np.int64), last
        return
    import pyarrow.compute as pc

    for table in _tables(rows, ["response_ids", "response_mask"]):
        responses = pc.list_flatten(table["response_ids"])
        lengths = pc.list_value_length(responses).to_numpy()
        ids = pc.list_flatten(responses).to_numpy()
        mask = pc.list_flatten(pc.list_flatten(table["response_mask"])).to_numpy()
        last = np.zeros(len(ids), dtype=bool)
        last[np.cumsum(lengths)[lengths > 0] - 1] = True
        if 0 < len(ids) == len(mask):
            yield ids, mask, last


def longest_text(model: nn.Module, *sets: Any) -> int | None:
    """Tokens of the longest text of the data sets; None where the model's layout does not depend on it."""
    if rotary_limit(model) is None:
        return None
    each = [e for one in sets for e in (one.values() if isinstance(one, dict) else [one])]
    return max((_longest(examples) for examples in each if examples is not None), default=0)


def check_layout(model: nn.Module, examples: Examples, layout: Layout, longest: int | None) -> None:
    """Raises DataError for data with texts for which the layout was not proved.

    Args:
        longest: of the texts that the layout was found for.
    """
    if longest is None or layout == "single":
        return
    limit = rotary_limit(model)
    if limit is None or longest > limit.positions:
        return
    if (length := _longest(examples)) > limit.positions:
        raise DataError(
            f"the data has a text of {length} tokens, and the trainer was made for {limit.positions}",
            code="data.unproved-length",
            why=f"the model's rotary embedding ({limit.kind}) changes there, for all texts of a batch",
            fix="give the trainer this data as eval_dataset when it is made, or set layout='single'",
        )


def _longest(examples: Examples) -> int:
    return max((length for _, length in examples.shapes("padded")), default=0)


def _extremes(examples: Examples) -> tuple[int, int, int]:
    """Largest and smallest token id, and tokens of the longest prompt with its longest response."""
    rows = examples.rows
    longest = _longest(examples)
    if not hasattr(rows, "with_format"):
        ids = [
            i for row in rows for part in (row["prompt_ids"], *row["response_ids"]) for i in part
        ]
        return max(ids), min(ids), longest
    import pyarrow.compute as pc

    found = [
        pc.min_max(part).as_py()
        for table in _tables(rows, ["prompt_ids", "response_ids"])
        for part in (
            pc.list_flatten(table["prompt_ids"]),
            pc.list_flatten(pc.list_flatten(table["response_ids"])),
        )
        if len(part)
    ]
    return max(f["max"] for f in found), min(f["min"] for f in found), longest


def _tables(rows: Any, columns: list[str]) -> Iterator[Any]:
    """The columns of a data set as Arrow tables of a few rows: they are not copied whole."""
    yield from rows.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS)
