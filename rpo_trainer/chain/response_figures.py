"""Tokenized held-out responses, for the figures of each response in `samples.jsonl`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rpo_trainer.data import Audit
from rpo_trainer.data.rows import is_blank
from rpo_trainer.data.tokenize import tokenize_rows
from rpo_trainer.errors import DataError
from rpo_trainer.rewards.evaluate import shown_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rpo_trainer.data.rows import Row

logger = logging.getLogger(__name__)

Examples = list[list[Mapping[str, Any] | None]]


def response_examples(
    rows: Sequence[Row], answers: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Examples:
    """Tokenize the sampled responses of the rows in `samples.jsonl`, each as a separate example.

    Args:
        rows: held-out prompts.
        answers: of `evaluate.respond`.

    Returns:
        `[shown rows][K]`: examples with one response, tokenized as in training; None for a response that
        is blank or that the chat template does not render.
    """
    shown = shown_rows(len(rows))
    found: Examples = [[None] * len(answers[place]["responses"]) for place in shown]
    alone = [
        {
            **rows[place], "id": f"{number} {k}", "responses": [text],
            "finished": [answers[place]["finished"][k]], "rewards": None, "attributes": [],
        }
        for number, place in enumerate(shown)
        for k, text in enumerate(answers[place]["responses"])
        if not is_blank(text)
    ]  # fmt: skip
    if not alone:
        return found
    try:
        examples = tokenize_rows(
            alone, tokenizer, kind="rating", max_length=sys.maxsize, truncation="drop",
            audit=Audit(), processes=1,
        )  # fmt: skip
    except DataError as error:
        logger.warning(
            "lengths and log-probs of the held-out responses are not computed: %s", error.what
        )
        return found
    for example in examples:
        number, k = map(int, example["id"].split())
        found[number][k] = example
    return found
