"""Examples of data sets passed to a trainer: tokenized by one process of a host, and mapped by all."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import datasets
import xxhash

from rpo_trainer.data import Audit, prepare_dataset
from rpo_trainer.data.audit_json import read_audit, write_audit
from rpo_trainer.data.pipeline import rows_by_number
from rpo_trainer.data.resumable_rows import content_key
from rpo_trainer.data.store import DataStore
from rpo_trainer.data.tokenize import TOKENIZED
from rpo_trainer.data.tokenized_shards import require_tokenized
from rpo_trainer.data.tokenizer_digest import tokenizer_digest

_EXAMPLES, _AUDIT = "examples", "audit.json"
_KEPT_SECONDS = 30 * 24 * 3600.0


def stored_examples(
    dataset: Any, tokenizer: Any, *, name: str, audit: Audit, **options: Any
) -> datasets.Dataset:
    """Return the tokenized examples of a data set, from the cache if it has them.

    The cache is the directory `rpo_trainer` in that of `datasets` (`HF_DATASETS_CACHE`). Entries that have
    not been used for 30 days are removed. With `datasets.disable_caching()` each process tokenizes into a
    temporary directory.

    Args:
        dataset: as for `prepare_dataset`; tokenized examples are returned unchanged.
        name: of the data set, for messages.
        audit: counts rows and warnings.
        options: further arguments of `prepare_dataset`.

    Raises:
        DataError, Problems, ModelError, RecipeError: as `prepare_dataset`.
    """
    if not isinstance(dataset, datasets.Dataset):
        dataset = rows_by_number(dataset)
    if not len(dataset) or set(TOKENIZED) <= _columns(dataset):
        return prepare_dataset(dataset, tokenizer, audit=audit, **options)
    caching = datasets.is_caching_enabled()
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "rpo_trainer"
    store = DataStore(cache if caching else None)
    key = content_key("examples", _content(dataset), tokenizer_digest(tokenizer), options)

    def build(folder: Path) -> None:
        counts = Audit()
        prepare_dataset(
            dataset,
            tokenizer,
            audit=counts,
            folder=folder / _EXAMPLES,
            label=f"tokenizing {name} data",
            **options,
        )
        write_audit(folder / _AUDIT, counts)
        store.collect(time.time() - _KEPT_SECONDS)

    entry = store.entry(key, build, f"the {name} data")
    audit.adopt(read_audit(entry / _AUDIT))
    return require_tokenized(entry / _EXAMPLES)


def _columns(dataset: Any) -> set[str]:
    names = dataset.column_names if isinstance(dataset, datasets.Dataset) else dataset[0]
    return set(names)


def _content(dataset: Any) -> str:
    """Return a digest of the rows of a data set, in order."""
    if isinstance(dataset, datasets.Dataset):
        return str(dataset._fingerprint)
    digest = xxhash.xxh3_128()
    for row in dataset:
        try:
            text = json.dumps(row)
        except (TypeError, ValueError):  # not JSON
            text = datasets.fingerprint.Hasher.hash(row)
        digest.update(text.encode())
    return str(digest.hexdigest())
