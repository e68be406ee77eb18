"""Rows of prompts to rows of responses: from policies on this machine and behind endpoints, mixed."""

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

logger = logging.getLogger(__name__)

Loaded = Callable[[], "tuple[PreTrainedModel, PreTrainedTokenizerBase]"]


class Policy(Protocol):
    """What responses are sampled from; `key` is of all that they depend on beside the rows."""

    name: str
    key: str

    def sample(
        self, rows: Sequence[Row], pending: Sequence[int], keys: Sequence[str], shard: Shard
    ) -> Iterator[Done]:
        """`responses` and `finished` (not cut by the limit) of the pending rows."""


class LocalPolicy:
    """A model of transformers, loaded when the first row needs it.

    Args:
        load: gives model and tokenizer.
        weights: a key of the weights.
        seed: of the random numbers, with the key of each row.
    """

    def __init__(
        self, name: str, load: Loaded, spec: GenerateSpec, *, weights: str, seed: int
    ) -> None:
        self.name = name
        self.spec = spec
        self.seed = seed
        self._load = load
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
            template_kwargs=kwargs_of(rows), shard=shard,
        )  # fmt: skip
        for index, samples in found:
            texts = [sample.text for sample in samples]
            yield Done(index, _fields(texts, [sample.finished for sample in samples]))
        del model, found
        gc.collect()
        empty_cache()


class EndpointPolicy:
    """A model behind an OpenAI-compatible endpoint; each response is a request with its own seed."""

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
        left_out: list[str] = []  # one entry a response; all threads add to it

        def make(index: int) -> dict[str, Any]:
            texts, finished = [], []
            for copy in range(self.spec.responses):
                text, whole, beside = self._one(rows[index], f"{self.seed}:{keys[index]}:{copy}")
                texts.append(text)
                finished.append(whole)
                left_out.extend(filter(None, [beside]))
            return _fields(texts, finished)

        try:
            yield from one_by_one(make, workers=self.endpoint.spec.concurrency)(pending, shard)
        finally:
            for names, count in sorted(Counter(left_out).items()):
                logger.warning(
                    "%s: %d responses came with %s, which is left out: a response is its text",
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
        if spec.top_k:  # not in OpenAI's own interface; vLLM and most servers know it
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
    """A response, whether it is whole, and the names of what its message has beside the text."""
    choice = answer.choices[0]
    message = getattr(choice, "message", None)
    text = choice.text if message is None else message.content
    if not isinstance(text, str):
        raise Unreadable("a completion without text", code="endpoint.no-text")
    found = [key for key in (*THINKING, "tool_calls") if not is_empty(getattr(message, key, None))]
    beside = " and ".join(f"`{key}`" for key in found)
    return encodable(text), choice.finish_reason != "length", beside


def _fields(texts: list[str], finished: list[bool]) -> dict[str, Any]:
    return {"responses": texts, "finished": finished}


def sampling_settings(spec: GenerateSpec) -> dict[str, Any]:
    """What of a spec shapes the responses, as it is kept in the rows."""
    names = ("responses", "temperature", "top_p", "top_k", "max_new_tokens")
    truth = {"with_ground_truth": True} if spec.with_ground_truth else {}
    return {**{name: getattr(spec, name) for name in names}, **truth}


def check_truths(rows: Sequence[Row], spec: GenerateSpec) -> None:
    """Raises DataError where the ground truth is to be among the responses, and no row has one."""
    if spec.with_ground_truth and rows and not any(row.get("ground_truth") for row in rows):
        raise DataError(
            "no row has a `ground_truth`",
            code="data.missing-ground-truth",
            why="`with_ground_truth` puts it among the responses of each row",
            fix="name its column with `columns: {ground_truth: theirs}`, or remove `with_ground_truth`",
        )


def row_keys(rows: Sequence[Row], prefix: str = "") -> list[str]:
    """A name for the random numbers of each row: its id, numbered where others have it too."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        name = f"{row['source']}/{row['id']}"
        seen[name] += 1
        keys.append(f"{prefix}{name}" if seen[name] == 1 else f"{prefix}{name}#{seen[name]}")
    return keys


def sample_rows(
    path: Path,
    rows: Sequence[Row],
    policies: Sequence[Policy],
    spec: GenerateSpec,
    *,
    seed: int,
    prefix: str = "",
    label: str = "",
    then: Callable[[list[Row]], None] | None = None,
    with_digest: bool = False,
    ranks: Ranks = ALONE,
) -> list[Row]:
    """The rows with `responses` of all policies, one after the other, also written to `path`.

    Beside them each row gains `finished` and `policies` (one entry a response) and `sampling`. Behind
    them stands the row's ground truth, if that is asked for, as of a policy `ground_truth`.
    Responses depend on the seed, the policy's place, `prefix` and the row's id alone.

    Args:
        path: resumed where it was interrupted, see `resumable_rows`.
        prefix: of the keys; two rounds with different ones sample different numbers.
        label, then, with_digest, ranks: as `write_rows_resumable`.

    Raises:
        DataError, RunError: as `write_rows_resumable` and `iter_responses`.
    """
    count = len(rows)
    keys = row_keys(rows, prefix)

    def work(pending: Sequence[int], shard: Shard) -> Iterator[Done]:
        for place, policy in enumerate(policies):
            own = [unit - place * count for unit in pending if unit // count == place]
            if own:
                names = [f"{place}:{key}" if place else key for key in keys]
                for done in policy.sample(rows, own, names, shard):
                    yield Done(place * count + done.index, done.fields, done.failed)

    def assemble(found: Sequence[dict[str, Any]]) -> list[Row]:
        made = []
        for index, row in enumerate(rows):
            parts = [found[place * count + index] for place in range(len(policies))]
            names = [p.name for p in policies for _ in range(spec.responses)]
            if spec.with_ground_truth and row.get("ground_truth"):
                parts.append(_fields([str(row["ground_truth"])], [True]))
                names.append("ground_truth")
            made.append(
                {
                    **row,
                    "responses": [text for part in parts for text in part["responses"]],
                    "finished": [flag for part in parts for flag in part["finished"]],
                    "policies": names,
                    "sampling": {**sampling_settings(spec), "seed": seed},
                }
            )
        return made

    ids = [str(row["id"]) for _ in policies for row in rows]
    key = content_key([policy.key for policy in policies], list(rows), seed, prefix)
    return write_rows_resumable(
        path, ids, work, assemble, key=key, what="sampled", label=label, then=then,
        with_digest=with_digest, ranks=ranks,
    )  # fmt: skip
