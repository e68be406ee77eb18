"""Data of reward models: checks of tokenized rows, and micro-batches with ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from rpo_trainer.errors import DataError, ModelError
from rpo_trainer.step.batch import PackedBatch
from rpo_trainer.trainers.examples import Examples, PackingCollator


@dataclass
class RatingBatch(PackedBatch):
    """A micro-batch of rated responses; `counts` are numbers of examples and ratings.

    Attributes:
        attributes: `[R, A]` float32, NaN for missing ratings.
        prompt_keys: hash of the prompt of each response.
    """

    attributes: Tensor
    prompt_keys: list[int]


class RatingCollator(PackingCollator):
    """Packs responses with their ratings, and counts ratings instead of tokens."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> RatingBatch:
        batch = super().__call__(examples)
        rows = examples or self._filler()
        ratings = torch.tensor(
            [
                [float("nan") if value is None else value for value in row["attributes"]]
                for row in rows
            ]
        )
        batch.counts[1] = (~ratings.isnan()).sum() if examples else 0
        keys = [
            xxhash.xxh3_64_intdigest(np.asarray(row["prompt_ids"], dtype=np.int64).tobytes())
            for row in rows
        ]
        return RatingBatch(**vars(batch), attributes=ratings, prompt_keys=keys)


def check_rated(examples: Examples, attributes: Sequence[str], name: str) -> None:
    """Raise DataError if rows are not single responses with ratings of these attributes."""
    _check_counts(
        examples,
        1,
        name,
        why="regression requires rated responses",
        fix="use one row per response",
    )
    _check_column(
        examples,
        "attributes",
        name,
        code="data.missing-ratings",
        why="regression is trained on ratings",
        fix="add ratings, or train on pairs",
    )
    width = len(attributes)
    wrong = [i for i, row in enumerate(examples.view) if not _fits(row["attributes"], width)]
    if wrong:
        raise DataError(
            f"{len(wrong)} rows of the {name} data do not have one rating (a number or null) for each of "
            f"{', '.join(attributes)}, the first at {wrong[:3]}",
            code="data.invalid-ratings",
            details={"data": name, "rows": wrong},
            fix="set `attributes` to a list of as many numbers or nulls, at least one of them a number",
        )


def check_pairs(examples: Examples, needs_rewards: bool, name: str) -> None:
    """Raise DataError if rows are not pairs, or lack rewards that are needed."""
    _check_counts(
        examples,
        2,
        name,
        why="the Bradley-Terry loss is for pairs",
        fix="use pairs (best and worst response)",
    )
    if needs_rewards:
        _check_column(
            examples,
            "rewards",
            name,
            code="data.missing-rewards",
            why="the margin is margin_scale times the reward gap",
            fix="add chosen_reward and rejected_reward, or set margin_scale to 0",
        )


def check_ends(examples: Examples, tokenizer: Any, name: str) -> None:
    """Raise ModelError if a response ends with the pad token: a classifier would skip its end."""
    if tokenizer.pad_token_id in _last_tokens(examples):
        raise ModelError(
            f"responses of the {name} data end with the pad token {tokenizer.pad_token!r}",
            code="tokenizer.pad-ends-response",
            why="the score of a classifier is read at the last token that is not padding",
            fix="set another pad token of the tokenizer",
        )


def _check_counts(examples: Examples, wanted: int, name: str, *, why: str, fix: str) -> None:
    if wrong := int((examples.response_counts() != wanted).sum()):
        responses = "one response" if wanted == 1 else "two responses"
        raise DataError(
            f"{wrong} rows of the {name} data do not have {responses}",
            code="data.response-count",
            details={"data": name, "rows": wrong},
            why=why,
            fix=fix,
        )


def _check_column(
    examples: Examples, column: str, name: str, *, code: str, why: str, fix: str
) -> None:
    missing = examples.without(column)
    if len(missing):
        raise DataError(
            f"{len(missing)} rows of the {name} data have no {column}, "
            f"the first at {missing[:3].tolist()}",
            code=code,
            details={"data": name, "rows": missing.tolist()},
            why=why,
            fix=fix,
        )


def _fits(ratings: Any, width: int) -> bool:
    return (
        len(ratings) == width
        and any(value is not None for value in ratings)
        and all(value is None or np.isfinite(value) for value in ratings)
    )


def _last_tokens(examples: Examples) -> set[int]:
    found: set[int] = set()
    for block in examples.view.blocks():
        stops = np.cumsum(block.response_lengths)[block.response_lengths > 0]
        found.update(np.unique(block.response_ids[stops - 1]).tolist())
    return found
