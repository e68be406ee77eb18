"""What tokenized examples ask of a model: rows of the embedding table, positions, end tokens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from rpo_trainer.data import end_token_ids
from rpo_trainer.errors import ModelError
from rpo_trainer.model_checks import positions_of
from rpo_trainer.sharding import rows_of
from rpo_trainer.step import causal_lm
from rpo_trainer.trainers.examples import Examples

logger = logging.getLogger(__name__)

_SHARE = 0.01  # of the ends of trained spans; rarer ones may be where a response was cut


def check_fit(
    model: nn.Module, examples: Examples | None, name: str, *, whose: str = "the model"
) -> None:
    """Raises ModelError where examples have tokens or positions that a model has no weights for.

    Every response restarts at its prompt's length, so an example is as long as its prompt and its longest
    response, however rows are packed. Beyond the trained length of rotary positions there is a WARNING only:
    they can be computed.
    """
    if examples is None or not len(examples):
        return
    inner = causal_lm(model)
    largest, smallest, longest = _extremes(examples)
    rows = rows_of(inner.get_input_embeddings().weight)
    if largest >= rows or smallest < 0:
        raise ModelError(
            f"the {name} data has token {largest if largest >= rows else smallest}, {whose} has {rows} "
            "embeddings",
            why="a token outside of the table cannot be embedded",
            fix="use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) "
            "before the model is passed",
        )
    limit = positions_of(inner.config)
    if limit is None or longest <= limit:
        return
    if any("Rotary" in type(part).__name__ for part in inner.modules()):
        logger.warning(
            "the longest example of the %s data has %d tokens; %s was made for %d positions (its config), "
            "and computes the others untrained",
            name, longest, whose, limit,
        )  # fmt: skip
        return
    raise ModelError(
        f"the longest example of the {name} data has {longest} tokens, {whose} has {limit} positions",
        why="there are no weights for positions beyond its table",
        fix=f"set max_length={limit}, or less",
    )


def check_all_fit(model: nn.Module, train: Any, evaluation: Any) -> None:
    """`check_fit` of a trainer's data sets; `evaluation` is one, several by name, or None."""
    check_fit(model, train, "train")
    several = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    for name, examples in several.items():
        check_fit(model, examples, f"eval_{name}" if name else "eval")


def trained_ends(examples: Examples | None, tokenizer: Any) -> list[int]:
    """The control tokens that trained spans end with, the most frequent first.

    What else a span ends with, where a response was cut or a mask has holes, ends nothing.
    """
    if examples is None or not len(examples) or tokenizer is None:
        return []
    counts: Counter[int] = Counter()
    for ids, mask, last in _responses(examples):
        followed = np.append(mask[1:], 0) & ~last
        found, times = np.unique(ids[(mask == 1) & (followed == 0)], return_counts=True)
        counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = _known_ends(tokenizer)
    control = {token for token, each in added.items() if each.special}
    least = _SHARE * sum(counts.values())
    return [
        token
        for token, count in counts.most_common()
        if token in known or (token in control and count >= least)
    ]


def _known_ends(tokenizer: Any) -> set[int]:
    if getattr(tokenizer, "is_fast", False):
        return set(end_token_ids(tokenizer))
    end = getattr(tokenizer, "eos_token_id", None)
    return set() if end is None else {int(end)}


def _responses(examples: Examples) -> Iterator[tuple[Any, Any, Any]]:
    """Of many responses after each other: token ids, masks, and whether a token is a response's last."""
    rows = examples.rows
    if not hasattr(rows, "with_format"):
        for row in rows:
            for ids, mask in zip(row["response_ids"], row["response_mask"], strict=True):
                if (
                    0 < len(ids) == len(mask)
                ):  # others are an error of the collator, which names the row
                    last = np.arange(len(ids)) == len(ids) - 1
                    yield np.asarray(ids), np.asarray(mask, dtype=np.int64), last
        return
    import pyarrow.compute as pc

    table = rows.with_format("arrow")[:]
    responses = pc.list_flatten(table["response_ids"])
    lengths = pc.list_value_length(responses).to_numpy()
    ids = pc.list_flatten(responses).to_numpy()
    mask = pc.list_flatten(pc.list_flatten(table["response_mask"])).to_numpy()
    last = np.zeros(len(ids), dtype=bool)
    last[np.cumsum(lengths)[lengths > 0] - 1] = True
    if 0 < len(ids) == len(mask):
        yield ids, mask.astype(np.int64), last


def _extremes(examples: Examples) -> tuple[int, int, int]:
    """Largest and smallest token id, and tokens of the longest prompt with its longest response."""
    rows = examples.rows
    longest = max(length for _, length in examples.shapes("padded"))
    if not hasattr(rows, "with_format"):
        ids = [
            i for row in rows for part in (row["prompt_ids"], *row["response_ids"]) for i in part
        ]
        return max(ids), min(ids), longest
    import pyarrow.compute as pc

    table = rows.with_format("arrow")[:]
    parts = (
        pc.list_flatten(table["prompt_ids"]),
        pc.list_flatten(pc.list_flatten(table["response_ids"])),
    )
    found = [pc.min_max(part).as_py() for part in parts if len(part)]
    return max(f["max"] for f in found), min(f["min"] for f in found), longest
