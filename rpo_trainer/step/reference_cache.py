"""Log-probs of responses by content, in memory and on disk.

    CACHE/<model key>/part-*.safetensors    keys [n, 2] int64, values [n] float32

Each part is written atomically.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rpo_trainer.data.arrow_rows import Array
from rpo_trainer.data.example_view import ExampleView

logger = logging.getLogger(__name__)

Key = tuple[int, int]

_NO_KEYS, _NO_VALUES = np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=np.float32)


def response_key(
    prompt_ids: Sequence[int] | Array,
    response_ids: Sequence[int] | Array,
    mask: Sequence[int] | Array,
) -> Key:
    """Return the content key of a response and its prompt, as two signed 64-bit integers."""
    parts: list[Any] = []
    for part in (prompt_ids, response_ids, mask):
        parts += len(part).to_bytes(4, "little"), np.asarray(part, dtype=np.int32)
    low, high = np.frombuffer(xxhash.xxh3_128_digest(b"".join(parts)), dtype=np.int64)
    return int(low), int(high)


def response_keys(view: ExampleView) -> Array:
    """Return `[Σ K, 2]` int64, the `response_key` of all responses, read from the buffers of the data.

    Raises:
        ValueError: examples with a different number of responses and masks.
    """
    found = bytearray()
    for block in view.blocks():
        counts = block.response_counts.tolist()
        prompts = _as_bytes(block.prompt_ids, block.prompt_lengths)
        responses = _as_bytes(block.response_ids, block.response_lengths)
        masks = _as_bytes(block.response_mask, block.mask_lengths)
        repeated = (prompt for prompt, k in zip(prompts, counts, strict=True) for _ in range(k))
        for prompt, response, mask in zip(repeated, responses, masks, strict=True):
            found += xxhash.xxh3_128_digest(b"".join((*prompt, *response, *mask)))
    return np.frombuffer(found, dtype=np.int64).reshape(-1, 2)


def _as_bytes(values: Array, lengths: Array) -> Iterator[tuple[memoryview, memoryview]]:
    """Yield length and values of each list, as int32."""
    flat = np.ascontiguousarray(values, dtype=np.int32).view(np.uint8).data
    sizes = lengths.astype(np.int32).view(np.uint8).data
    stops = (4 * np.cumsum(lengths)).tolist()
    for i, (start, stop) in enumerate(pairwise([0, *stops])):
        yield sizes[4 * i : 4 * i + 4], flat[start:stop]


class ReferenceCache(Mapping[Key, float]):
    """Values by key, as in the directory. Damaged parts are removed with a warning, and computed again.

    Values are held in arrays: a dict of tuples would take ten times the memory.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._keys, self._values = _NO_KEYS, _NO_VALUES  # sorted by the first half of the key
        self._added: list[tuple[Array, Array]] = []
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
        self._added.append((keys, values))

    def _sort(self) -> None:
        if not self._added:
            return
        # The newest value of a key first, which is the one that is kept.
        parts = [*reversed(self._added), (self._keys, self._values)]
        keys = np.concatenate([part for part, _ in parts])
        values = np.concatenate([part for _, part in parts])
        order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
        keys, values = keys[order], values[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        self._keys, self._values, self._added = keys[first], values[first], []

    def lookup(self, keys: Array) -> tuple[Array, Array]:
        """Return the values of keys, and whether they are known.

        Args:
            keys: `[n, 2]` int64.

        Returns:
            `[n]` float32, 0 for unknown keys; `[n]` bool.
        """
        self._sort()
        found, known = np.zeros(len(keys), dtype=np.float32), np.zeros(len(keys), dtype=bool)
        place = np.searchsorted(self._keys[:, 0], keys[:, 0])
        open_ = np.flatnonzero(place < len(self._keys))
        while len(open_):  # twice only if two keys have the same first half
            stored, wanted = self._keys[place[open_]], keys[open_]
            same = (stored == wanted).all(axis=1)
            known[open_[same]] = True
            found[open_[same]] = self._values[place[open_[same]]]
            open_ = open_[~same & (stored[:, 0] == wanted[:, 0])]
            place[open_] += 1
            open_ = open_[place[open_] < len(self._keys)]
        return found, known

    def __getitem__(self, key: Key) -> float:
        values, known = self.lookup(np.array([key], dtype=np.int64))
        if not known[0]:
            raise KeyError(key)
        return float(values[0])

    def __len__(self) -> int:
        self._sort()
        return len(self._keys)

    def __iter__(self) -> Iterator[Key]:
        self._sort()
        for low, high in self._keys:
            yield int(low), int(high)

    def add(self, new: Mapping[Key, float], *, on_disk: bool = True) -> None:
        """Add values, also on disk if the cache has a directory."""
        if not new:
            return
        keys = np.array(list(new), dtype=np.int64)
        values = np.array(list(new.values()), dtype=np.float32)
        self._added.append((keys, values))
        if self.folder is None or not on_disk:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
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
        self._keys, self._values, self._added = _NO_KEYS, _NO_VALUES, []
        for part in self.folder.glob("part-*.safetensors") if self.folder else ():
            part.unlink(missing_ok=True)


def _digest(keys: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> int:
    """Return the digest of a part's content, including shapes and dtypes."""
    digest = xxhash.xxh3_64()
    for array in (keys, values):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return int(digest.intdigest() % 2**63)
