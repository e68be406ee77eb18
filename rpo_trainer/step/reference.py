"""Reference log-probs, computed once by the same code as those of the policy, and cached on disk by content.

A cached value depends on the weights (including adapters), the dtype of the arithmetic, and the tokens of
prompt and response. It is reused when the learning rate, the output directory, or the order or mixture of
the data change, and is not reused when any of these dependencies does.

    CACHE/<model key>/part-*.safetensors    keys [n, 2] int64, values [n] float32

Each part is written atomically.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from rpo_trainer.errors import ModelError
from rpo_trainer.models.sharding import device_of, gathered
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.runtime.row_progress import RowProgress
from rpo_trainer.step.batch import Layout
from rpo_trainer.step.forward import token_logprobs
from rpo_trainer.step.logprobs import response_sums
from rpo_trainer.step.packing import forward_tokens, pack

logger = logging.getLogger(__name__)

# Incremented whenever the same weights and tokens yield different values.
_VERSION = "1"
_ROWS_PER_PART = 2048
_VERIFIED_ROWS = 4

Key = tuple[int, int]


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


def response_key(
    prompt_ids: Sequence[int], response_ids: Sequence[int], mask: Sequence[int]
) -> Key:
    """Return the content key of a response and its prompt, as two signed 64-bit integers."""
    digest = xxhash.xxh3_128()
    for part in (prompt_ids, response_ids, mask):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(np.asarray(part, dtype=np.int32).tobytes())
    low, high = np.frombuffer(digest.digest(), dtype=np.int64)
    return int(low), int(high)


def _digest(keys: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> int:
    """Return the digest of a part's content, including shapes and dtypes."""
    digest = xxhash.xxh3_64()
    for array in (keys, values):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return int(digest.intdigest() % 2**63)


class ReferenceCache:
    """Values by key in a directory. Damaged parts are removed with a warning, and computed again."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.values: dict[Key, float] = {}
        for part in sorted(self.folder.glob("part-*.safetensors")) if self.folder else ():
            self._read(part)

    def _read(self, part: Path) -> None:
        try:
            tensors = load_file(part)
            keys, values = tensors["keys"], tensors["values"]
            if int(tensors["digest"][0]) != _digest(keys, values):
                raise ValueError("its content does not match its checksum")
        except (SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
            logger.warning("%s is damaged (%s): its values are recomputed", part, error)
            part.unlink(missing_ok=True)
            return
        for (low, high), value in zip(keys.tolist(), values.tolist(), strict=True):
            self.values[(low, high)] = value

    def add(self, new: Mapping[Key, float], *, on_disk: bool = True) -> None:
        """Add values, also on disk if the cache has a directory."""
        self.values.update(new)
        if self.folder is None or not new or not on_disk:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = np.array(list(new), dtype=np.int64)
        values = np.array(list(new.values()), dtype=np.float32)
        tensors: dict[str, Any] = {
            "keys": keys,
            "values": values,
            "digest": np.array([_digest(keys, values)], dtype=np.int64),
        }
        handle, staged = tempfile.mkstemp(dir=self.folder, prefix=".part-")
        os.close(handle)
        save_file(tensors, staged)
        os.replace(
            staged, self.folder / f"part-{xxhash.xxh3_64_hexdigest(keys.tobytes())}.safetensors"
        )

    def forget(self) -> None:
        """Delete all values, also on disk."""
        self.values.clear()
        for part in self.folder.glob("part-*.safetensors") if self.folder else ():
            part.unlink(missing_ok=True)


def dataset_logprobs(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    *,
    layout: Layout,
    cache: ReferenceCache,
    batch_tokens: int = 8192,
    pad_token_id: int = 0,
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[dict[Key, float]], dict[Key, float]] = lambda values: values,
    progress: RowProgress | None = None,
    tolerance: float = 1e-3,
) -> list[list[float]]:
    """Compute Σ log π over the trained tokens of each response, using cached values where available.

    Args:
        model: the reference model or another policy, with `forward.install` applied for `layout`. It is in
            eval mode during the pass.
        examples: tokenized examples.
        cache: known values; new ones are added.
        batch_tokens: number of tokens per forward, without gradient.
        shard: (rank, world size): the part of the missing values that this process computes.
        gather: merges the values of all ranks.
        progress: shows the number of examples done; its total is set here.
        tolerance: allowed difference between a cached and a recomputed value, in nats per token.

    Returns:
        A list of K numbers for each example.
    """
    keys = [
        [
            response_key(example["prompt_ids"], response, mask)
            for response, mask in zip(
                example["response_ids"], example["response_mask"], strict=True
            )
        ]
        for example in examples
    ]
    device = device_of(model)
    training = model.training
    model.eval()
    try:
        run = _Pass(model, layout, pad_token_id, device)
        _verify(run, examples, keys, cache, tolerance)
        missing = [i for i, row in enumerate(keys) if any(key not in cache.values for key in row)]
        missing.sort(key=lambda i: (-forward_tokens(examples[i], layout), i))
        rank, world = shard
        batches = _batches(missing, examples, layout, batch_tokens)
        if progress is not None:
            progress.total = len(missing)
        unsaved: dict[Key, float] = {}
        waiting = 0
        # In each round every rank runs a batch, repeating one if none is left: sharded weights require it.
        for start in range(0, len(batches), world):
            batch = batches[min(start + rank, len(batches) - 1)]
            sums = run([examples[i] for i in batch])
            flat = [key for i in batch for key in keys[i]]
            unsaved.update(zip(flat, sums.tolist(), strict=True))
            done = [i for part in batches[start : start + world] for i in part]
            if progress is not None:
                progress.advance(len(done))
            waiting += sum(len(keys[i]) for i in done)
            if waiting >= _ROWS_PER_PART or start + world >= len(batches):
                cache.add(gather(unsaved), on_disk=rank == 0)
                unsaved, waiting = {}, 0
    finally:
        model.train(training)
    return [[cache.values[key] for key in row] for row in keys]


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


def _batches(
    order: Sequence[int], examples: Sequence[Mapping[str, Any]], layout: Layout, batch_tokens: int
) -> list[list[int]]:
    """Group consecutive examples into batches within the token budget, with at least one example each."""
    batches: list[list[int]] = []
    room = 0
    for index in order:
        tokens = forward_tokens(examples[index], layout)
        if not batches or tokens > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(index)
        room -= tokens
    return batches


def _verify(
    run: _Pass,
    examples: Sequence[Mapping[str, Any]],
    keys: Sequence[Sequence[Key]],
    cache: ReferenceCache,
    tolerance: float,
) -> None:
    """Recompute a few cached rows; if one differs, the cache is stale and is cleared."""
    known = [i for i, row in enumerate(keys) if all(key in cache.values for key in row)]
    if not known:
        return
    chosen = np.random.default_rng(len(known)).choice(
        known, size=min(_VERIFIED_ROWS, len(known)), replace=False
    )
    rows = [int(i) for i in chosen]
    fresh = run([examples[i] for i in rows]).tolist()
    stored = [cache.values[key] for i in rows for key in keys[i]]
    tokens = [max(1, sum(mask)) for i in rows for mask in examples[i]["response_mask"]]
    worst = max(abs(a - b) / n for a, b, n in zip(fresh, stored, tokens, strict=True))
    if not worst <= tolerance:
        logger.warning(
            "reference log-prob cache %s is stale: %d rows differ by up to %.2g nats per token when "
            "recomputed. The entire cache is recomputed",
            cache.folder, len(rows), worst,
        )  # fmt: skip
        cache.forget()
