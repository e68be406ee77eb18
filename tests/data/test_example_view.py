"""Tokenized examples from the buffers of Arrow tables equal plain rows, however they are stored."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from rpo_trainer.data.example_table import example_dataset
from rpo_trainer.data.example_view import ExampleView, example_view
from rpo_trainer.data.tokenize_batch import schema
from rpo_trainer.errors import DataError
from tests.raising import raises
from tests.trainers.plain import as_lists

Row = dict[str, Any]


def random_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows with 1 to 4 responses, of 0 to 6 tokens, with and without rewards and single ratings."""
    rng = np.random.default_rng(seed)

    def tokens(low: int) -> list[int]:
        return rng.integers(0, 50_000, rng.integers(low, 7)).tolist()

    rows = []
    for number in range(count):
        responses = [tokens(0) for _ in range(rng.integers(1, 5))]
        numbers = [float(value) for value in rng.normal(size=len(responses))]
        rows.append(
            {
                "id": f"row-ä-{number}",
                "source": "one",
                "prompt_ids": tokens(1),
                "response_ids": responses,
                "response_mask": [rng.integers(0, 2, len(ids)).tolist() for ids in responses],
                "rewards": None if number % 3 == 0 else numbers,
                "attributes": [None if number % 2 else 1.5, 2.0],
            }
        )
    return rows


ROWS = random_rows(60)


def stored(rows: list[Row], chunk: int = 1000) -> datasets.Dataset:
    """Rows as `tokenize_rows` stores them, in chunks."""
    tables = [
        pa.Table.from_pylist(rows[start : start + chunk], schema=schema("rating"))
        for start in range(0, len(rows), chunk)
    ]
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables)))


def on_disk(rows: list[Row], folder: Path) -> datasets.Dataset:
    stored(rows, 13).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def large(rows: list[Row]) -> datasets.Dataset:
    """Rows of another program: 64-bit offsets and integers, rewards in single precision."""
    ids = pa.large_list(pa.int64())
    types = {
        "prompt_ids": ids,
        "response_ids": pa.large_list(ids),
        "response_mask": pa.large_list(ids),
    }
    fields = [pa.field(f.name, types.get(f.name, f.type)) for f in schema("rating")]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    return datasets.Dataset(datasets.table.InMemoryTable(table))


ORDER = [5, 3, 59, 0, 17, 3, 41]

STORED: dict[str, tuple[Callable[[Path], Any], list[Row]]] = {
    "list": (lambda _: ROWS, ROWS),
    "arrays": (
        lambda _: [{**row, "prompt_ids": np.array(row["prompt_ids"])} for row in ROWS],
        ROWS,
    ),
    "one chunk": (lambda _: stored(ROWS), ROWS),
    "chunks": (lambda _: stored(ROWS, 7), ROWS),
    "inferred types": (lambda _: datasets.Dataset.from_list(ROWS), ROWS),
    "64 bits": (lambda _: large(ROWS), ROWS),
    "mapped": (lambda folder: on_disk(ROWS, folder), ROWS),
    "slice": (lambda _: datasets.Dataset(stored(ROWS, 7).data.slice(10, 31)), ROWS[10:41]),
    "selected": (lambda _: stored(ROWS, 7).select(ORDER), [ROWS[i] for i in ORDER]),
    "range": (lambda _: stored(ROWS, 7).select(range(20, 40)), ROWS[20:40]),
    "joined": (
        lambda _: datasets.concatenate_datasets([stored(ROWS[:9]), stored(ROWS).select(ORDER)]),
        ROWS[:9] + [ROWS[i] for i in ORDER],
    ),
    "formatted": (lambda _: stored(ROWS).with_format("torch"), ROWS),
}


@pytest.mark.parametrize("form", STORED)
def test_a_view_is_the_plain_rows(form: str, tmp_path: Path) -> None:
    make, rows = STORED[form]
    view = example_view(make(tmp_path))
    assert len(view) == len(rows)
    assert [as_lists(row) for row in view] == rows
    assert as_lists(view[-1]) == rows[-1] and as_lists(view[2:5]) == rows[2:5]
    with pytest.raises(IndexError):
        view[len(rows)]
    assert view.prompt_lengths().tolist() == [len(row["prompt_ids"]) for row in rows]
    assert view.response_counts().tolist() == [len(row["response_ids"]) for row in rows]
    lengths = [len(ids) for row in rows for ids in row["response_ids"]]
    assert view.response_lengths().tolist() == lengths
    missing = [i for i, row in enumerate(rows) if row["rewards"] is None]
    assert view.without("rewards").tolist() == missing
    assert view.without("id").tolist() == [] and len(view.without("other")) == len(rows)


@pytest.mark.parametrize("form", STORED)
def test_blocks_are_the_flat_values(form: str, tmp_path: Path, monkeypatch: Any) -> None:
    from rpo_trainer.data import example_view as module

    monkeypatch.setattr(module, "_BLOCK", 4)
    make, rows = STORED[form]
    blocks = list(example_view(make(tmp_path)).blocks())
    assert max(len(block.response_counts) for block in blocks) <= 4
    flat = [np.concatenate(parts).tolist() for parts in zip(*blocks, strict=True)]
    responses = [ids for row in rows for ids in row["response_ids"]]
    masks = [mask for row in rows for mask in row["response_mask"]]
    assert flat == [
        [token for row in rows for token in row["prompt_ids"]],
        [len(row["prompt_ids"]) for row in rows],
        [len(row["response_ids"]) for row in rows],
        [token for ids in responses for token in ids],
        [len(ids) for ids in responses],
        [value for mask in masks for value in mask],
        [len(mask) for mask in masks],
    ]


def test_slices_are_not_copied() -> None:
    dataset = stored(ROWS, 7)
    view = ExampleView(dataset)
    chunk = dataset.data.table["prompt_ids"].chunk(2).values.to_numpy()
    row = view[15]
    assert np.shares_memory(row["prompt_ids"], chunk)
    assert row["prompt_ids"].dtype == np.int32 and not row["prompt_ids"].flags.writeable
    assert {mask.dtype for mask in row["response_mask"]} == {np.dtype(np.int8)}


def test_no_row_is_read_through_arrow_scalars(monkeypatch: Any) -> None:
    """A scalar of Arrow costs a hundred times as much as a slice."""
    view = ExampleView(stored(ROWS, 7).remove_columns("attributes"))  # with missing numbers
    from rpo_trainer.data import arrow_rows

    own = arrow_rows._reader

    class Refusing:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __getattr__(self, name: str) -> Any:
            return getattr(self.array, name)

        def __getitem__(self, row: int) -> Any:
            raise AssertionError("read as a scalar")

    monkeypatch.setattr(arrow_rows, "_reader", lambda array: own(Refusing(array)))
    assert [row["id"] for row in view] == [row["id"] for row in ROWS]


def test_a_view_is_pickled_by_its_data_set(tmp_path: Path) -> None:
    view = ExampleView(on_disk(ROWS, tmp_path).select(ORDER))
    packed = pickle.dumps(view)
    again = pickle.loads(packed)
    assert [as_lists(row) for row in again] == [ROWS[i] for i in ORDER]
    more = ExampleView(on_disk(ROWS * 50, tmp_path / "more").select(ORDER))
    assert len(pickle.dumps(more)) < len(packed) + 500  # the path of the file, not the data


def test_other_columns_are_kept() -> None:
    rows = [{**row, "n": i, "tags": ["a", "b"], "extra": {"x": i}} for i, row in enumerate(ROWS)]
    assert [as_lists(row) for row in example_view(rows)] == rows
    assert [as_lists(row) for row in ExampleView(datasets.Dataset.from_list(rows))] == rows


class ByIndex:
    """A data set that makes its rows when they are asked for."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> Row:
        self.made.append(index)
        return ROWS[index]


def test_rows_by_index_are_read_once() -> None:
    theirs = ByIndex()
    view = example_view(theirs)
    assert [as_lists(row) for row in view] == ROWS
    assert view.fingerprint() == ExampleView(stored(ROWS)).fingerprint()
    assert theirs.made == list(range(len(ROWS)))


# --- digest ---


def test_a_digest_depends_on_the_examples_alone(tmp_path: Path) -> None:
    key = ExampleView(stored(ROWS)).fingerprint()
    for form in ("list", "arrays", "chunks", "inferred types", "64 bits", "mapped", "formatted"):
        assert example_view(STORED[form][0](tmp_path / form)).fingerprint() == key, form
    assert ExampleView(stored(ROWS, 7).select([*range(60)])).fingerprint() == key
    back = stored(ROWS[::-1], 7).select(range(59, -1, -1))
    assert ExampleView(back).fingerprint() == key
    part = ExampleView(stored(ROWS[10:41])).fingerprint()
    assert example_view(STORED["slice"][0](tmp_path)).fingerprint() == part != key
    renamed = [{**row, "id": "other", "source": "other"} for row in ROWS]
    assert example_view(renamed).fingerprint() == key


def changed(column: str, value: Any, row: int = 4) -> list[Row]:
    return [{**one, column: value} if i == row else one for i, one in enumerate(ROWS)]


def test_a_digest_changes_with_every_part() -> None:
    one = ROWS[4]
    responses, masks = one["response_ids"], one["response_mask"]
    assert len(responses) > 1 and responses[0]
    other = [
        changed("prompt_ids", [*one["prompt_ids"][:-1], 7]),
        changed("prompt_ids", [*one["prompt_ids"], 7]),
        changed("response_ids", [[*responses[0][:-1], 7], *responses[1:]]),
        changed("response_mask", [[1 - m for m in masks[0]], *masks[1:]]),
        changed("rewards", [v + 1e-9 for v in one["rewards"]]),
        changed("rewards", None),
        changed("rewards", []),
        changed("attributes", [None, 2.0]),
        changed("attributes", [0.0, 2.0]),
        # The same numbers, divided elsewhere.
        changed("response_ids", [responses[0] + responses[1], [], *responses[2:]]),
        [*ROWS[:4], ROWS[5], ROWS[4], *ROWS[6:]],
        ROWS[:-1],
    ]
    keys = {example_view(rows).fingerprint() for rows in [ROWS, *other]}
    assert len(keys) == 1 + len(other)


# --- memory ---


def test_examples_hold_no_python_objects() -> None:
    """View, costs and reference log-probs of 20,000 rows take less than half a KiB each."""
    from rpo_trainer.data.ragged import Ragged
    from rpo_trainer.step.reference_cache import ReferenceCache, response_keys
    from rpo_trainer.trainers.examples import Examples

    count = 20_000
    table = stored(ROWS * 8).data.table  # chunks about as large as those of `tokenize_rows`
    table = pa.concat_tables([table] * (count // len(table) + 1)).slice(0, count)
    dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
    Examples(dataset).costs("shared")  # imports
    tracemalloc.start()
    examples = Examples(dataset)
    for row in range(0, count, 97):
        examples[row]
    costs = [examples.costs("shared"), examples.shapes("padded")]
    keys = response_keys(examples.view)
    cache = ReferenceCache(None)
    for start in range(0, len(keys), 2048):
        part = keys[start : start + 2048].tolist()
        cache.add(dict.fromkeys(map(tuple, part), -1.0))
    values, known = cache.lookup(keys)
    examples.extra["reference_logps"] = Ragged(values, examples.response_counts())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert known.all() and len(costs) == 2
    assert held / count <= 512


# --- refused ---


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("prompt_ids", [1.5]),
        ("prompt_ids", 3),
        ("prompt_ids", None),
        ("response_ids", [1, 2]),
        ("response_mask", [[None]]),
        ("response_mask", "11"),
    ],
)
def test_rows_that_are_no_examples_are_refused(column: str, value: Any) -> None:
    with raises("data.tokenized-row", DataError, row=4):
        example_dataset(changed(column, value))


def test_columns_that_cannot_be_read_are_refused() -> None:
    with raises("data.tokenized-column", DataError, column="prompt_ids"):
        example_dataset(changed("prompt_ids", [2**40]))
    with raises("data.tokenized-column", DataError, column="n"):
        example_dataset([{**ROWS[0], "n": 1}, {**ROWS[0], "n": "one"}])
    text = [{**row, "prompt_ids": ["a"]} for row in ROWS]
    with raises("data.tokenized-column", DataError, column="prompt_ids"):
        ExampleView(datasets.Dataset.from_list(text))
    with raises("data.tokenized-column", DataError, column="response_mask"):
        ExampleView(stored(ROWS).remove_columns("response_mask"))
    empty = datasets.Dataset.from_list(changed("response_ids", None, 7))
    with raises("data.tokenized-column", DataError, column="response_ids", rows=[7]):
        ExampleView(empty)
    assert len(ExampleView(empty.select([1, 2]))) == 2  # not one of its rows
    inner = datasets.Dataset.from_list(changed("response_ids", [[1, None]]))
    with raises("data.tokenized-column", DataError, column="response_ids", rows=[]):
        ExampleView(inner)
