"""Reference log-probs, computed once by the same code as those of the policy, and cached on disk by content.

A cached value depends on the weights (including adapters), the dtype of the arithmetic, and the tokens of
prompt and response. It is reused when the learning rate, the output directory, or the order or mixture of
the data change, and is not reused when any of these dependencies does; see
`rpo_trainer.step.reference_cache`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from rpo_trainer.data.arrow_rows import Array
from rpo_trainer.data.example_view import ExampleView, example_view
from rpo_trainer.data.ragged import Ragged
from rpo_trainer.errors import ModelError
from rpo_trainer.models.sharding import device_of, gathered
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.runtime.row_progress import RowProgress
from rpo_trainer.step.batch import Layout
from rpo_trainer.step.forward import token_logprobs
from rpo_trainer.step.logprobs import response_sums
from rpo_trainer.step.packing import forward_costs, pack
from rpo_trainer.step.reference_cache import Key, ReferenceCache, response_keys

logger = logging.getLogger(__name__)

# Incremented whenever the same weights and tokens yield different values.
_VERSION = "1"
_ROWS_PER_PART = 2048
_VERIFIED_ROWS = 4


def model_key(model: nn.Module, *, arithmetic: str = "") -> str:
    """Return the content key of a model: all parameters and buffers, the relevant config, and the dtype.

    Args:
        arithmetic: further settings that affect rounding, such as the autocast dtype.
    """
    digest = xxhash.xxh3_128()
    inner = transformers_model(model)
    config = inner.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "use_cache", "architectures"):
        config.pop(name, None)
    parts = [_VERSION, arithmetic, config, _adapter_settings(model)]
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        if weight.numel() and weight.is_meta:
            raise ModelError(
                "a weight is on the meta device and has no values",
                code="model.no-values",
                where=name,
                why="reference log-probs are cached under a hash of all weights",
                fix="load all weights, without offloading (device_map) or init_empty_weights",
            )
        with gathered(weight) as tensor:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.contiguous().reshape(-1).view(torch.uint8).cpu()
            digest.update(flat.numpy().data)
    return str(digest.hexdigest())


def _adapter_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings that affect an adapter's output, such as its scale."""
    adapters = getattr(model, "peft_config", None) or {}
    settings = {name: dict(config.to_dict()) for name, config in sorted(adapters.items())}
    for values in settings.values():
        for name in ("base_model_name_or_path", "revision", "inference_mode", "peft_version"):
            values.pop(name, None)
        # Sets are not ordered.
        values.update({k: sorted(v) for k, v in values.items() if isinstance(v, set)})
    return settings


def cached_logprobs(examples: Any, cache: ReferenceCache) -> Ragged | None:
    """Return what `dataset_logprobs` returns, if all values are in the cache; otherwise None."""
    view = example_view(examples)
    values, known = cache.lookup(response_keys(view))
    return Ragged(values, view.response_counts()) if known.all() else None


def dataset_logprobs(
    model: nn.Module,
    examples: Any,
    *,
    layout: Layout,
    cache: ReferenceCache,
    batch_tokens: int = 8192,
    pad_token_id: int = 0,
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[dict[Key, float]], dict[Key, float]] = lambda values: values,
    progress: RowProgress | None = None,
    tolerance: float = 1e-3,
) -> Ragged:
    """Compute Σ log π over the trained tokens of each response, using cached values where available.

    Args:
        model: the reference model or another policy, with `forward.install` applied for `layout`. It is in
            eval mode during the pass.
        examples: tokenized examples, see `example_view`.
        cache: known values; new ones are added.
        batch_tokens: number of tokens per forward, without gradient.
        shard: (rank, world size): the part of the missing values that this process computes.
        gather: merges the values of all ranks.
        progress: shows the number of examples done; its total is set here.
        tolerance: allowed difference between a cached and a recomputed value, in nats per token.

    Returns:
        K numbers for each example, float32.

    Raises:
        KeyError: a value is missing after `gather`.
    """
    view = example_view(examples)
    device = device_of(model)
    training = model.training
    model.eval()
    try:
        run = _Pass(model, layout, pad_token_id, device)
        keys = _Keys(view)
        _verify(run, view, keys, cache, tolerance)
        costs = forward_costs(view, layout)
        missing = np.flatnonzero(keys.missing(cache))
        missing = missing[np.argsort(-costs[missing], kind="stable")]
        rank, world = shard
        batches = _batches(missing.tolist(), costs, batch_tokens)
        if progress is not None:
            progress.total = len(missing)
        unsaved: dict[Key, float] = {}
        waiting = 0
        # In each round every rank runs a batch, repeating one if none is left: sharded weights require it.
        for start in range(0, len(batches), world):
            batch = batches[min(start + rank, len(batches) - 1)]
            sums = run([view[i] for i in batch])
            flat = [key for i in batch for key in keys.of(i)]
            unsaved.update(zip(flat, sums.tolist(), strict=True))
            done = [i for part in batches[start : start + world] for i in part]
            if progress is not None:
                progress.advance(len(done))
            waiting += int(keys.counts[done].sum())
            if waiting >= _ROWS_PER_PART or start + world >= len(batches):
                cache.add(gather(unsaved), on_disk=rank == 0)
                unsaved, waiting = {}, 0
    finally:
        model.train(training)
    values, known = cache.lookup(keys.flat)
    if not known.all():
        raise KeyError(f"{int((~known).sum())} values are missing")
    return Ragged(values, keys.counts)


class _Keys:
    """The keys of all responses: `[Σ K, 2]`, and K of each example."""

    def __init__(self, view: ExampleView) -> None:
        self.flat = response_keys(view)
        self.counts = view.response_counts()
        self.stops = np.cumsum(self.counts)

    def span(self, index: int) -> slice:
        """Return where the keys of an example are."""
        return slice(self.stops[index] - self.counts[index], self.stops[index])

    def of(self, index: int) -> list[Key]:
        """Return the keys of an example."""
        return [(low, high) for low, high in self.flat[self.span(index)].tolist()]

    def missing(self, cache: ReferenceCache) -> Array:
        """Return `[n]` bool, whether a value of the example is not in the cache."""
        _, known = cache.lookup(self.flat)
        found = np.zeros(len(self.counts), dtype=bool)
        found[np.repeat(np.arange(len(found)), self.counts)[~known]] = True
        return found


class _Pass:
    """A forward without gradient: examples → `[R]` sums."""

    def __init__(
        self, model: nn.Module, layout: Layout, pad_token_id: int, device: torch.device
    ) -> None:
        self.model = model
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.device = device

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Tensor:
        batch = pack(examples, self.layout, pad_token_id=self.pad_token_id)
        inputs = batch.model_inputs.to(self.device)
        index = batch.response_index.to(self.device)
        with torch.no_grad():
            logps = token_logprobs(self.model, inputs)
            return response_sums(logps, index, len(batch.response_tokens)).float().cpu()


def _batches(order: Sequence[int], costs: Array, batch_tokens: int) -> list[list[int]]:
    """Group consecutive examples into batches within the token budget, with at least one example each."""
    batches: list[list[int]] = []
    room = 0
    for index in order:
        tokens = int(costs[index])
        if not batches or tokens > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(index)
        room -= tokens
    return batches


def _verify(
    run: _Pass, view: ExampleView, keys: _Keys, cache: ReferenceCache, tolerance: float
) -> None:
    """Recompute a few cached rows; if one differs, the cache is stale and is cleared."""
    known = np.flatnonzero(~keys.missing(cache))
    if not len(known):
        return
    chosen = np.random.default_rng(len(known)).choice(
        known, size=min(_VERIFIED_ROWS, len(known)), replace=False
    )
    examples = [view[int(i)] for i in chosen]
    fresh = run(examples).tolist()
    stored, _ = cache.lookup(np.concatenate([keys.flat[keys.span(int(i))] for i in chosen]))
    tokens = [max(1, int(mask.sum())) for example in examples for mask in example["response_mask"]]
    worst = max(abs(a - b) / n for a, b, n in zip(fresh, stored.tolist(), tokens, strict=True))
    if not worst <= tolerance:
        logger.warning(
            "reference log-prob cache %s is stale: %d rows differ by up to %.2g nats per token when "
            "recomputed. The entire cache is recomputed",
            cache.folder, len(examples), worst,
        )  # fmt: skip
        cache.forget()
