"""Sample responses to rows of prompts, from local policies and from endpoints."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from rpo_trainer.data.resumable_rows import (
    Done,
    Shard,
    content_key,
    one_by_one,
    write_rows_resumable,
)
from rpo_trainer.data.rows import THINKING, Row, is_empty, kwargs_of
from rpo_trainer.errors import DataError
from rpo_trainer.rewards.endpoint import Endpoint, Unreadable, encodable
from rpo_trainer.rewards.endpoint_messages import chat_messages, template_options, warn_unsent
from rpo_trainer.runtime.devices import empty_cache
from rpo_trainer.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from openai import OpenAI
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rpo_trainer.recipe import EndpointSpec, GenerateSpec
    from rpo_trainer.rewards.prompts import EncodedPrompts

logger = logging.getLogger(__name__)

Loaded = Callable[[], "tuple[PreTrainedModel, PreTrainedTokenizerBase]"]


class Policy(Protocol):
    """A source of responses; `key` identifies everything but the rows that they depend on."""

    name: str
    key: str

    def sample(
        self, rows: Sequence[Row], pending: Sequence[int], keys: Sequence[str], shard: Shard
    ) -> Iterator[Done]:
        """Yield `responses` and `finished` (not truncated) of the pending rows."""


class LocalPolicy:
    """A local transformers model, loaded for the first row.

    Args:
        name: written into the rows.
        load: returns model and tokenizer.
        spec: the sampling settings.
        weights: a key of the weights.
        seed: of the random numbers, together with the key of each row.
        encoded: tokens of the rows' prompts, shared by the policies that sample for the same rows.
    """

    def __init__(
        self,
        name: str,
        load: Loaded,
        spec: GenerateSpec,
        *,
        weights: str,
        seed: int,
        encoded: EncodedPrompts | None = None,
    ) -> None:
        self.name = name
        self.spec = spec
        self.seed = seed
        self._load = load
        self._encoded = encoded
        self.key = content_key("local", weights, sampling_settings(spec), seed)

    def sample(
        self, rows: Sequence[Row], pending: Sequence[int], keys: Sequence[str], shard: Shard
    ) -> Iterator[Done]:

        from rpo_trainer.rewards.sample import iter_responses

        model, tokenizer = self._load()
        spec = self.spec
        found = iter_responses(
            model, tokenizer, [row["prompt"] for row in rows], pending,
            responses=spec.responses, max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k,
            batch_size=spec.batch_size, seed=self.seed, keys=keys,
            tools=[row.get("tools") for row in rows],
            parsed=[row.get("special_tokens") == "parse" for row in rows],
            template_kwargs=kwargs_of(rows), encoded=self._encoded, shard=shard,
        )  # fmt: skip
        for index, samples in found:
            texts = [sample.text for sample in samples]
            yield Done(index, _fields(texts, [sample.finished for sample in samples]))
        del model, found
        gc.collect()
        empty_cache()


class EndpointPolicy:
    """A model served by an OpenAI-compatible endpoint; each response is one request with its own seed."""

    def __init__(self, endpoint: EndpointSpec, spec: GenerateSpec, *, seed: int) -> None:
        self.name = endpoint.model
        self.spec = spec
        self.seed = seed
        self.endpoint = Endpoint(endpoint)
        settings = sampling_settings(spec)
        own = () if endpoint.chat_template_kwargs is None else (endpoint.chat_template_kwargs,)
        self.key = content_key("endpoint", endpoint.url, endpoint.model, settings, seed, *own)

    def sample(
        self, rows: Sequence[Row], pending: Sequence[int], keys: Sequence[str], shard: Shard
    ) -> Iterator[Done]:
        spec = self.endpoint.spec
        own = spec.chat_template_kwargs is not None
        warn_unsent(rows, spec.url, completions=True, documents=not own)
        left_out: list[str] = []  # one entry per response; all threads append to it

        def make(index: int) -> dict[str, Any]:
            texts, finished = [], []
            for copy in range(self.spec.responses):
                text, complete, discarded = self._one(
                    rows[index], f"{self.seed}:{keys[index]}:{copy}"
                )
                texts.append(text)
                finished.append(complete)
                left_out.extend(filter(None, [discarded]))
            return _fields(texts, finished)

        try:
            yield from one_by_one(make, workers=self.endpoint.spec.concurrency)(pending, shard)
        finally:
            for names, count in sorted(Counter(left_out).items()):
                logger.warning(
                    "%s: %d responses have %s, which is discarded: only the text is kept",
                    self.endpoint.spec.url, count, names,
                )  # fmt: skip

    def _one(self, row: Row, key: str) -> tuple[str, bool, str]:
        spec = self.spec
        options: dict[str, Any] = {
            "model": self.endpoint.spec.model,
            "max_tokens": spec.max_new_tokens,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "seed": xxhash.xxh3_64_intdigest(key.encode()) % 2**31,
        }
        if spec.top_k:  # not part of OpenAI's API; vLLM and most servers accept it
            options["extra_body"] = {"top_k": spec.top_k}
        prompt = row["prompt"]
        if not isinstance(prompt, str) and (variables := template_options(self.endpoint.spec, row)):
            body = {**options.get("extra_body", {}), **variables["extra_body"]}
            options["extra_body"] = body

        def send(client: OpenAI) -> Any:
            if isinstance(prompt, str):
                return client.completions.create(prompt=prompt, **options)
            tools = {"tools": row["tools"]} if row.get("tools") else {}
            messages: Any = chat_messages(prompt)
            return client.chat.completions.create(messages=messages, **options, **tools)

        return self.endpoint.ask(send, _response)


def _response(answer: Any) -> tuple[str, bool, str]:
    """Return the text, whether it is complete, and the names of other content of the message."""
    choice = answer.choices[0]
    message = getattr(choice, "message", None)
    text = choice.text if message is None else message.content
    if not isinstance(text, str):
        raise Unreadable("the endpoint returned a completion without text", code="endpoint.no-text")
    keys = [key for key in (*THINKING, "tool_calls") if not is_empty(getattr(message, key, None))]
    discarded = " and ".join(f"`{key}`" for key in keys)
    return encodable(text), choice.finish_reason != "length", discarded


def _fields(texts: list[str], finished: list[bool]) -> dict[str, Any]:
    return {"responses": texts, "finished": finished}


def sampling_settings(spec: GenerateSpec) -> dict[str, Any]:
    """Return the sampling settings that are written into the rows."""
    names = ("responses", "temperature", "top_p", "top_k", "max_new_tokens")
    truth = {"with_ground_truth": True} if spec.with_ground_truth else {}
    return {**{name: getattr(spec, name) for name in names}, **truth}


def check_truths(rows: Sequence[Row], spec: GenerateSpec) -> None:
    """Raise DataError if the ground truth is to be added to the responses and no row has one."""
    if spec.with_ground_truth and rows and not any(row.get("ground_truth") for row in rows):
        raise DataError(
            "none of the rows has a `ground_truth`",
            code="data.missing-ground-truth",
            why="`with_ground_truth` adds it to the responses of each row",
            fix="name its column with `columns: {ground_truth: NAME}`, or remove `with_ground_truth`",
        )


def row_keys(rows: Sequence[Row], prefix: str = "") -> list[str]:
    """Return a unique name for the random numbers of each row: its id, numbered if it repeats."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        name = f"{row['source']}/{row['id']}"
        seen[name] += 1
        keys.append(f"{prefix}{name}" if seen[name] == 1 else f"{prefix}{name}#{seen[name]}")
    return keys


def sampling_key(rows: Sequence[Row], policies: Sequence[Policy], *, seed: int, prefix: str) -> str:
    """Return a digest of everything that sampled rows depend on."""
    return content_key([policy.key for policy in policies], rows, seed, prefix)


def sample_rows(
    path: Path,
    rows: Sequence[Row],
    policies: Sequence[Policy],
    spec: GenerateSpec,
    *,
    seed: int,
    prefix: str = "",
    key: str | None = None,
    label: str = "",
    then: Callable[[list[Row]], None] | None = None,
    with_digest: bool = False,
    ranks: Ranks = ALONE,
) -> list[Row]:
    """Sample `responses` from all policies, in order, and write the rows to `path`.

    Each row also gets `finished` and `policies` (one entry per response) and `sampling`. With
    `with_ground_truth` the row's ground truth is the last response, with `ground_truth` as its policy.
    Responses depend only on the seed, the index of the policy, `prefix` and the row's id.

    Args:
        path: resumes after an interruption, see `resumable_rows`.
        rows: with `prompt`.
        policies: what is sampled from.
        spec: the sampling settings.
        seed: of the random numbers.
        prefix: of the random numbers' keys; rounds with different prefixes use different random numbers.
        key: `sampling_key` of the arguments, if known.
        label, then, with_digest, ranks: as in `write_rows_resumable`.

    Raises:
        DataError, RunError: as `write_rows_resumable` and `iter_responses`.
    """
    count = len(rows)
    names = row_keys(rows, prefix)

    def work(pending: Sequence[int], shard: Shard) -> Iterator[Done]:
        for place, policy in enumerate(policies):
            own = [unit - place * count for unit in pending if unit // count == place]
            if own:
                keys = [f"{place}:{name}" if place else name for name in names]
                for done in policy.sample(rows, own, keys, shard):
                    yield Done(place * count + done.index, done.fields, done.failed)

    def assemble(results: Sequence[dict[str, Any]]) -> list[Row]:
        sampled = []
        for index, row in enumerate(rows):
            parts = [results[place * count + index] for place in range(len(policies))]
            names = [p.name for p in policies for _ in range(spec.responses)]
            if spec.with_ground_truth and row.get("ground_truth"):
                parts.append(_fields([str(row["ground_truth"])], [True]))
                names.append("ground_truth")
            sampled.append(
                {
                    **row,
                    "responses": [text for part in parts for text in part["responses"]],
                    "finished": [flag for part in parts for flag in part["finished"]],
                    "policies": names,
                    "sampling": {**sampling_settings(spec), "seed": seed},
                }
            )
        return sampled

    ids = [str(row["id"]) for _ in policies for row in rows]
    key = sampling_key(rows, policies, seed=seed, prefix=prefix) if key is None else key
    return write_rows_resumable(
        path, ids, work, assemble, key=key, what="sampled", label=label, then=then,
        with_digest=with_digest, ranks=ranks,
    )  # fmt: skip
