"""Score responses with a local reward model: packed forwards, in batches of similar length."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rpo_trainer.attributes import resolve_weights
from rpo_trainer.data.encode import Encoder
from rpo_trainer.data.rendered import render_plain
from rpo_trainer.data.resumable_rows import Done, RowFailed, Shard
from rpo_trainer.data.rows import Row, RowError, response_message
from rpo_trainer.data.template_variables import unread
from rpo_trainer.data.trained_spans import ChatRenderer
from rpo_trainer.errors import DataError, ModelError, first_line
from rpo_trainer.models.from_pretrained import LOADING_ERRORS, load_complete, load_pretrained
from rpo_trainer.models.reward_model import attributes_of
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.runtime.devices import best_device, has_accelerator, widest
from rpo_trainer.runtime.file_errors import reads
from rpo_trainer.step.batch import Layout
from rpo_trainer.step.forward import response_scores
from rpo_trainer.step.layout_probe import probe
from rpo_trainer.step.packing import forward_tokens, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class RewardModel:
    """Sequence classifier with one score per label; the reward is their weighted sum.

    A response is rendered as in training: after its prompt, with the chat template and its end marker.
    Scores are read at the last token. A prompt is computed once for all its responses, without padding,
    if the model allows it (see `probe`).

    Args:
        path: a directory or hub name.
        weights: see `resolve_weights`; None: `reward_weights` of the model's config, else the mean.
        layout: the only step layout to try; None: the fastest one that agrees with plain forwards.

    Raises:
        ModelError: the model cannot be loaded, is not a decoder with a score head, or agrees with no layout.
        RecipeError: the weights do not match its labels.
    """

    def __init__(
        self,
        path: str | Path,
        weights: str | Mapping[str, float] | None = None,
        *,
        layout: Layout | None = None,
    ) -> None:
        self.path = str(path)
        self.model, self.tokenizer = _load(self.path)
        self.layout, _ = probe(self.model, layout=layout)
        self.attributes = attributes_of(self.model)
        if weights is None:
            weights = getattr(self.model.config, "reward_weights", None)
        by_name = resolve_weights(weights, self.attributes)
        self.weights = [by_name[name] for name in self.attributes]
        self._renderer = ChatRenderer(self.tokenizer)
        self._encoder = Encoder(self.tokenizer)

    def score(
        self, rows: Sequence[Row], pending: Sequence[int], batch_tokens: int, shard: Shard = (0, 1)
    ) -> Iterator[Done]:
        """Yield `rewards` and `scores` (by label) of the responses of the pending rows.

        The batches depend on all rows, not only on the pending ones, so that rounding is the same in a
        resumed run. The longest batches come first, so that running out of memory shows immediately.

        Args:
            rows: all rows.
            pending: indices of the rows to score.
            batch_tokens: maximum number of tokens in a forward pass, padding included; the responses of a row
                stay together.
            shard: (rank, ranks): the batches that this process computes.
        """
        wanted = set(pending)
        rank, world = shard
        if rank == 0:
            self._warn_unread(rows)
        examples: dict[int, list[_Example]] = {}
        for index, row in enumerate(rows):
            try:
                examples[index] = _examples(self.encode(row))
            except RowError as error:
                if index in wanted and rank == 0:
                    yield Done(index, None, RowFailed(str(error), code=error.code))
        for batch in list(_batches(examples, self.layout, batch_tokens))[rank::world]:
            if wanted.isdisjoint(batch):
                continue
            scores = iter(self._forward([one for index in batch for one in examples[index]]))
            for index in batch:
                own = [next(scores) for _ in rows[index]["responses"]]
                if index in wanted:
                    yield Done(index, self._fields(own))

    def _warn_unread(self, rows: Sequence[Row]) -> None:
        """Log a warning about variables of rows that the chat template does not read."""
        counts = Counter(
            name
            for row in rows
            if not isinstance(row["prompt"], str)
            for name in unread(row.get(COLUMN), self.tokenizer)
        )
        for name, count in sorted(counts.items()):
            logger.warning(
                "%s: the chat template does not read `%s` of `%s` (%d of %d rows)",
                self.path, name, COLUMN, count, len(rows),
            )  # fmt: skip

    def encode(self, row: Row) -> list[list[int]]:
        """Return the token ids of the prompt with each response; RowError beyond the context length."""
        prompt, tools = row["prompt"], row.get("tools")
        parsed = row.get("special_tokens") == "parse"
        renderer = self._renderer.using(row.get(COLUMN), parsed=parsed)
        if isinstance(prompt, str):
            texts = [render_plain(prompt, response, parsed=parsed) for response in row["responses"]]
        else:
            texts = [
                renderer.conversation(
                    [*prompt, response_message(row, number)], tools, last_only=True, parsed=parsed
                )
                for number in range(len(row["responses"]))
            ]
        apart = [any(text.literal for text in texts)] * len(texts)
        found = [_until_end(*each) for each in self._encoder.encode(texts, apart)]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, found), default=0)
        if limit is not None and longest > limit:
            raise RowError(
                f"longer than the reward model's context of {limit} tokens",
                code="model.context-exceeded",
            )
        return found

    def _forward(self, examples: list[_Example]) -> list[list[float]]:
        """Return [responses][labels] scores, read at the last token of each response."""
        if not examples:
            return []
        device = next(self.model.parameters()).device
        untrained = [
            {**e, "response_mask": [[0] * len(ids) for ids in e["response_ids"]]} for e in examples
        ]
        inputs = pack(untrained, self.layout).model_inputs.to(device)
        with torch.no_grad():
            # Not the classifier's own pooling at the last token that is not padding: if the pad token is
            # also the end token, it reads one token early.
            found: list[list[float]] = widest(response_scores(self.model, inputs)).tolist()
        return found

    def _fields(self, scores: list[list[float]]) -> dict[str, Any]:
        rewards = [sum(w * s for w, s in zip(self.weights, each, strict=True)) for each in scores]
        if not all(reward == reward and abs(reward) != float("inf") for reward in rewards):
            raise ModelError(
                "the reward model returns a score that is not finite",
                code="model.non-finite-scores",
                where=self.path,
                why="its weights are damaged or overflow in their dtype; other scores may be wrong too",
                fix="check its weights, or save the model in bfloat16 or float32",
            )
        named = [dict(zip(self.attributes, each, strict=True)) for each in scores]
        return {"rewards": rewards, "scores": named}


_Example = dict[str, Any]  # as for `pack`, without masks


def _examples(texts: list[list[int]]) -> list[_Example]:
    """Split the texts of one row into shared prompt and responses; separate examples if nothing is shared."""
    columns = enumerate(zip(*texts, strict=False))
    shortest = min(map(len, texts), default=0)
    shared = next((i for i, column in columns if len({*column}) > 1), shortest)
    if not shared:
        return [{"prompt_ids": text, "response_ids": [[]]} for text in texts]
    return [{"prompt_ids": texts[0][:shared], "response_ids": [text[shared:] for text in texts]}]


def _batches(
    examples: Mapping[int, list[_Example]], layout: Layout, batch_tokens: int
) -> Iterator[list[int]]:
    """Yield batches of rows of similar length, the longest first; a single row may exceed the limit."""

    def longest(index: int) -> int:
        found = examples[index]
        return max(
            (len(e["prompt_ids"]) + len(r) for e in found for r in e["response_ids"]), default=0
        )

    def tokens(index: int, width: int) -> int:
        if layout == "padded":
            return width * sum(len(e["response_ids"]) for e in examples[index])
        return sum(forward_tokens(e, layout) for e in examples[index])

    batch: list[int] = []
    width = count = 0
    for index in sorted(examples, key=lambda i: (-longest(i), i)):
        if batch and count + tokens(index, width) > batch_tokens:
            yield batch
            batch, count = [], 0
        width = width if batch else longest(index)
        batch.append(index)
        count += tokens(index, width)
    if batch:
        yield batch


def _until_end(ids: list[int], mask: list[int]) -> list[int]:
    """Return the ids up to the last token of the response, without what the template writes after it."""
    if 1 not in mask:
        raise RowError("a response has no tokens", code="rewards.empty-response")
    return ids[: len(mask) - mask[::-1].index(1)]


@reads("the reward model", str)
def _load(path: str) -> tuple[Any, PreTrainedTokenizerBase]:
    factory: Any = AutoModelForSequenceClassification
    try:
        model = load_complete(factory, path, dtype="auto" if has_accelerator() else torch.float32)
        tokenizer = load_pretrained(AutoTokenizer, path)
    except LOADING_ERRORS as error:
        raise ModelError(
            "the reward model cannot be loaded",
            code="model.cannot-load",
            where=path,
            why=first_line(error),
            fix="give a directory with a sequence classifier and its tokenizer, or a hub name",
        ) from error
    if not hasattr(model, "score"):
        raise ModelError(
            f"a {type(model).__name__} has no score head on a decoder",
            code="model.no-score-head",
            where=path,
            why="rewards are computed by a head named `score` at the last token of a response",
            fix="give a decoder saved with AutoModelForSequenceClassification",
        )
    model.to(best_device()).eval()
    return model, tokenizer


def check_template(model: RewardModel, rows: Sequence[Row]) -> None:
    """Raise DataError if rows are messages and the reward model has no chat template."""
    if model.tokenizer.chat_template is None and any(
        not isinstance(r["prompt"], str) for r in rows
    ):
        raise DataError(
            "the rows are messages, and the reward model's tokenizer has no chat template",
            code="template.missing",
            where=model.path,
            why="scores are only meaningful for text in the format of its training",
            fix="add the template it was trained with (chat_template.jinja in its directory)",
        )
