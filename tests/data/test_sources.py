from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import sources
from rpo_trainer.data.sources import RawSource, load_source
from rpo_trainer.errors import DataError
from tests.raising import raises

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "ç 🙂", "response": "ד"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def load(path: Path, source: Any, **fields: Any) -> RawSource:
    return load_source(source(path.name, **fields), path.parent, 0)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, source: Any, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        data = json.dumps(ROWS).encode() if name.endswith(".json") else LINES
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = load(path, source)
    assert found.rows == ROWS
    assert found.name == name
    assert found.places == ([1, 2] if "jsonl" in name else [0, 1])


def test_saved_dataset_with_and_without_splits(tmp_path: Path, source: Any) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(
        str(tmp_path / "two")
    )
    assert load(tmp_path / "one", source).rows == ROWS
    assert load(tmp_path / "two", source).rows == ROWS
    assert load(tmp_path / "two", source, split="test").rows == ROWS[1:]
    with raises("data.unknown-split", DataError) as error:
        load(tmp_path / "two", source, split="dev")
    assert "'dev'" in error.value.what and "train, test" in str(error.value.fix)
    (tmp_path / "other").mkdir()
    with raises("data.not-a-data-set", DataError):
        load(tmp_path / "other", source)


def test_a_hub_name_is_loaded_and_its_failure_is_explained(
    tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def fake(name: str, split: str | None, trust_remote_code: bool) -> Any:
        assert not trust_remote_code
        asked.append((name, split))
        if name == "someone/absent":
            raise ConnectionError("no network")
        data = datasets.Dataset.from_list(ROWS)
        return data if split else datasets.DatasetDict({"train": data})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(sources, "hub_answers", lambda *_: True)
    assert load_source(source("someone/data"), tmp_path, 0).rows == ROWS
    assert load_source(source("someone/data", split="test"), tmp_path, 0).rows == ROWS
    assert asked == [("someone/data", None), ("someone/data", "test")]
    with raises("data.no-such-data-set", DataError) as error:
        load_source(source("someone/absent"), tmp_path, 0)
    assert "no network" in str(error.value)


NO_FILES = ["absent.jsonl", "deep/er/absent", "../absent", "absent.csv", "./data/absent", "a b"]


@pytest.mark.parametrize("name", NO_FILES)
def test_absent_file_is_not_taken_for_a_hub_name(
    tmp_path: Path, source: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def requested(*_: Any) -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(sources, "hub_answers", requested)
    with raises("data.no-such-file", DataError):
        load_source(source(name), tmp_path, 0)


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_does_not_answer_is_not_retried(
    offline: bool, tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_dataset` would retry for 25 s; it is called only if its cache has the data set."""
    import datasets
    import huggingface_hub

    def fake(name: str, split: str | None, trust_remote_code: bool) -> Any:
        loaded.append(name)
        return datasets.Dataset.from_list(ROWS)

    def unreachable(*_: Any, **__: Any) -> bool:
        raise ConnectionError("no network")

    loaded: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", unreachable)
    (tmp_path / "my_prefs.jsonl").write_bytes(LINES)
    for name in ("my_pref", "someone/HelpData"):
        with raises("data.no-such-data-set", DataError, where=name) as error:
            load_source(source(name), tmp_path, 0)
        assert ("HF_HUB_OFFLINE" in error.value.what) is offline
        assert ("`my_prefs.jsonl`" in error.value.what) is (name == "my_pref")
    assert loaded == []
    (tmp_path / "cache" / "someone___help_data" / "default" / "0.0.0" / "hash").mkdir(parents=True)
    assert load_source(source("someone/HelpData"), tmp_path, 0).rows == ROWS
    assert loaded == ["someone/HelpData"]


def test_task_rows(source: Any) -> None:
    spec = source(task="quickstart/code", size=5)
    first, again = load_source(spec, None, 3), load_source(spec, None, 3)
    assert len(first.rows) == 5
    assert first.rows == again.rows
    assert first.rows != load_source(spec, None, 4).rows
    own = source(task="quickstart/code", size=5, seed=3)
    assert load_source(own, None, 4).rows == first.rows


def test_a_file_has_no_splits(tmp_path: Path, source: Any) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with raises("data.no-splits", DataError):
        load(tmp_path / "rows.jsonl", source, split="train")
