"""Checks of tokenized examples against a model: vocabulary, positions, end tokens."""

from __future__ import annotations

import logging
from collections import Counter
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

# Fraction of trained spans, or of the occurrences of a token; rarer ones may be due to truncation.
_MIN_FRACTION = 0.01
_OFFSETS = 8  # maximum offset of position tables: 2 in OPT and BART


def check_fit(
    model: nn.Module, examples: Examples | None, name: str, *, whose: str = "the model"
) -> None:
    """Raise ModelError if examples have tokens or positions that a model has no weights for.

    Positions of each response start at the length of the prompt, so an example has the length of its prompt
    and longest response in every layout. If positions are computed (rotary, ALiBi) or not used, exceeding the
    length of pretraining is only a WARNING.
    """
    if examples is None or not len(examples):
        return
    inner = transformers_model(model)
    largest, smallest, longest = _extremes(examples)
    rows = num_rows(inner.get_input_embeddings().weight)
    if largest >= rows or smallest < 0:
        raise ModelError(
            f"the {name} data has token id {largest if largest >= rows else smallest}, but {whose} has "
            f"{rows} embeddings",
            code="model.missing-embeddings",
            details={
                "data": name,
                "token": largest if largest >= rows else smallest,
                "embeddings": rows,
            },
            fix="use the tokenizer of the model, or call model.resize_token_embeddings(len(tokenizer)) first",
        )
    limit = positions_of(inner.config)
    if limit is None or longest <= limit:
        return
    if not _has_table(inner, limit):
        logger.warning(
            "the longest example of the %s data has %d tokens, but %s was trained with %d positions: later "
            "positions are extrapolated",
            name, longest, whose, limit,
        )  # fmt: skip
        return
    raise ModelError(
        f"the longest example of the {name} data has {longest} tokens, but {whose} has {limit} positions",
        code="model.missing-positions",
        details={"data": name, "model": whose, "tokens": longest, "positions": limit},
        fix=f"set max_length to at most {limit}",
    )


def _has_table(inner: Any, positions: int) -> bool:
    """Whether a model has a table of positions: an embedding or buffer with about as many rows."""
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
    """Call `check_fit` for the data sets of a trainer; `evaluation` is one, a dict of several, or None."""
    check_fit(model, train, "train")
    several = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    for name, examples in several.items():
        check_fit(model, examples, f"eval_{name}" if name else "eval")


def trained_ends(examples: Examples | None, tokenizer: Any) -> list[int]:
    """Return the special tokens at the end of trained spans, the most frequent first.

    Tokens that are often followed by trained tokens, such as the end of an analysis before the answer, are
    omitted: generation must not stop there. So are rare ones, from truncated responses or masks with gaps.
    """
    if examples is None or not len(examples) or tokenizer is None:
        return []
    known = _known_ends(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    candidates = np.array(sorted(known | {t for t, each in added.items() if each.special}))
    ends: Counter[int] = Counter()
    inside: Counter[int] = Counter()
    spans = 0
    for block in examples.view.blocks():
        ids = block.response_ids
        if len(ids) != len(block.response_mask):
            continue  # the collator refuses it
        last = np.zeros(len(ids), dtype=bool)
        last[np.cumsum(block.response_lengths)[block.response_lengths > 0] - 1] = True
        trained = block.response_mask == 1
        followed = trained & np.append(trained[1:], False) & ~last
        final = trained & ~followed
        spans += int(final.sum())
        for chosen, counts in ((final, ends), (followed, inside)):
            tokens = ids[chosen]
            found, times = np.unique(tokens[np.isin(tokens, candidates)], return_counts=True)
            counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    often = [t for t, n in ends.most_common() if t in known or n >= _MIN_FRACTION * spans]
    continued = [t for t in often if inside[t] > _MIN_FRACTION * (inside[t] + ends[t])]
    if (unsaid := [t for t in continued if t in known]) and is_main():
        logger.warning(
            "%s: not added to the saved eos_token_id, because trained tokens follow it",
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


def longest_text(model: nn.Module, *sets: Any) -> int | None:
    """Return the length of the longest text in tokens; None if the model's layout does not depend on it."""
    if rotary_limit(model) is None:
        return None
    each = [e for one in sets for e in (one.values() if isinstance(one, dict) else [one])]
    return max((_longest(examples) for examples in each if examples is not None), default=0)


def check_layout(model: nn.Module, examples: Examples, layout: Layout, longest: int | None) -> None:
    """Raise DataError for data with texts that are too long for the chosen layout.

    Args:
        longest: tokens of the longest text that the layout was checked for.
    """
    if longest is None or layout == "single":
        return
    limit = rotary_limit(model)
    if limit is None or longest > limit.positions:
        return
    if (length := _longest(examples)) > limit.positions:
        raise DataError(
            f"the data has a text of {length} tokens; the layout was checked only up to {limit.positions}",
            code="data.unproved-length",
            why=f"the rotary embedding ({limit.kind}) changes at this length for all texts of a batch",
            fix="pass this data as eval_dataset to the constructor, or set layout='single'",
        )


def _longest(examples: Examples) -> int:
    return int(examples.shapes("padded")[:, 1].max(initial=0))


def _extremes(examples: Examples) -> tuple[int, int, int]:
    """Return the largest and smallest token id, and tokens of the longest prompt with response."""
    parts = [
        ids
        for block in examples.view.blocks()
        for ids in (block.prompt_ids, block.response_ids)
        if len(ids)
    ]
    largest = max((int(ids.max()) for ids in parts), default=0)
    smallest = min((int(ids.min()) for ids in parts), default=0)
    return largest, smallest, _longest(examples)
