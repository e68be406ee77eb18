"""Rows computed one by one: the file is the same after a kill or a failure at any point."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import UserList
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import xxhash

from rpo_trainer.data import partial_file, resumable_rows
from rpo_trainer.data.partial_file import partial_path
from rpo_trainer.data.resumable_rows import (
    Done,
    RowFailed,
    Shard,
    content_key,
    is_intact,
    map_rows_resumable,
    one_by_one,
    read_rows,
    write_rows,
)
from rpo_trainer.errors import DataError, RunError
from rpo_trainer.runtime.files import digest_path
from rpo_trainer.runtime.ranks import Ranks
from tests.conftest import Injected
from tests.raising import raises, with_code


def line(index: int, key: str = "k", n: int | None = None) -> bytes:
    return partial_file.line(key, index, {"n": index if n is None else n})


ROWS = [{"id": f"r{i}", "text": "x\u2028" * i} for i in range(12)]
EXPECTED = [{**row, "n": i} for i, row in enumerate(ROWS)]


def run(path: Path, make: Any = lambda i: {"n": i}, workers: int = 1, **more: Any) -> Any:
    settings = {"key": "k", "what": "made", **more}
    return map_rows_resumable(path, ROWS, one_by_one(make, workers), **settings)


@pytest.mark.parametrize("workers", [1, 4])
def test_order_is_kept_and_nothing_else_is_left(workers: int, tmp_path: Path) -> None:
    def make(index: int) -> dict[str, Any]:
        time.sleep(0.002 * (len(ROWS) - index))
        return {"n": index}

    path = tmp_path / "deep" / "out.jsonl"
    assert run(path, make, workers) == EXPECTED == read_rows(path)
    assert [p.name for p in path.parent.iterdir()] == ["out.jsonl"]


def test_concurrency_is_bounded(tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def make(index: int) -> dict[str, Any]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return {"n": index}

    run(tmp_path / "out.jsonl", make, workers=3)
    assert most == 3


@pytest.mark.parametrize("kept", range(0, 13))
def test_stopped_anywhere_it_resumes_and_makes_only_what_is_missing(
    kept: int, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    run(whole)
    path = tmp_path / "out.jsonl"
    order = (3, 1, 0, *range(4, 12), 2)[:kept]
    partial_path(path).write_bytes(b"".join(map(line, order)))
    made: list[int] = []
    run(path, lambda i: made.append(i) or {"n": i})
    assert made == [i for i in range(12) if i not in order]
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "parts",
    [
        (),
        ("a", 1, None, 0.5),
        ([],),
        ([[]], {}, [{}]),
        ((), (1,), [1, (2, [3])]),
        ([{"b": [1, {"z": 0, "a": "é\u2028"}], "a": None}, {"a": Path("x")}], 7, "p/"),
        ({"b": [{"d": 1, "c": 2}], "a": "x"},),
        ([float("inf"), True, "\ud800"], b"x"),
    ],
)
def test_a_key_is_that_of_one_json_text(parts: tuple[Any, ...]) -> None:
    """Results that an earlier version left unfinished are found by this key."""
    text = json.dumps(parts, sort_keys=True, default=str)
    assert content_key(*parts) == xxhash.xxh3_64_hexdigest(text.encode())


def test_a_key_depends_on_the_rows_and_not_on_their_container() -> None:
    rows = [{"id": str(i), "prompt": "x" * i} for i in range(5)]
    assert content_key("a", rows) != content_key("a", rows[:4])
    assert content_key("a", tuple(rows)) == content_key("a", UserList(rows))
    assert content_key("a", tuple(rows)) == content_key(
        "a", [dict(reversed(r.items())) for r in rows]
    )
    keys = {content_key(*parts) for parts in (([1], [2]), ([1, 2],), ([1, [2]],), ([[1], [2]],))}
    assert len(keys) == 4


def test_a_key_of_many_rows_needs_the_memory_of_one() -> None:
    row = {"id": "r", "prompt": "x" * 10_000}
    tracemalloc.start()
    content_key("a", [row] * 2_000)  # 20 MB of JSON
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_a_truncated_line_is_recomputed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for cut in (b'[1, {"n"', line(1)[:-1], b"\x00\x00\x00\n", b"\n"):
        partial_path(path).write_bytes(line(0) + cut)
        made: list[int] = []
        assert run(path, lambda i: made.append(i) or {"n": i}) == EXPECTED  # noqa: B023
        assert made == list(range(1, 12))


def test_unfinished_work_of_something_else_is_refused_and_left(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    partial_path(path).write_bytes(line(0, "other", 5))
    before = partial_path(path).read_bytes()
    with raises("output.partial-mismatch", RunError, where=str(partial_path(path))):
        run(path)
    assert partial_path(path).read_bytes() == before
    assert not path.exists()


def test_unfinished_work_without_a_result_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    partial_path(path).write_bytes(line(0, "other")[:-9])
    assert run(path) == EXPECTED
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_something_else_under_the_name_of_unfinished_work(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    make(partial_path(path))
    with raises("output.partial-not-a-file", RunError, where=str(partial_path(path))):
        run(path)


def test_work_that_fails_before_its_first_result_leaves_nothing(tmp_path: Path) -> None:
    def work(pending: Sequence[int], shard: Shard) -> Iterator[Done]:
        raise RunError("no model", code="model.missing")
        yield

    with raises("model.missing", RunError):
        map_rows_resumable(tmp_path / "new" / "o.jsonl", ROWS, work, key="k", what="made")
    assert not list(tmp_path.rglob("*.jsonl*"))


@pytest.mark.parametrize("place", [0, 1, 4, 10])
@pytest.mark.parametrize("at", [0, 2, 6, 15, -6])
def test_a_byte_changed_anywhere_costs_its_row_only(
    at: int, place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the key, the index, the result or the digest; the line is usually still valid JSON."""
    path = tmp_path / "out.jsonl"
    lines = [bytearray(line(i, n=7)) for i in range(11)]
    lines[place][at] ^= 1
    partial_path(path).write_bytes(b"".join(lines))
    made: list[int] = []
    assert run(path, lambda i: made.append(i) or {"n": 7}) == [{**row, "n": 7} for row in ROWS]
    assert made == [place, 11]
    assert "1 damaged line" in caplog.text and partial_path(path).name in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"n": 3', '"n": 8'),
        lambda text: "".join(text.splitlines(keepends=True)[:-2]),
        lambda text: text + text.splitlines(keepends=True)[0],
        lambda text: text.replace("3", "\x00"),
        lambda text: "",
    ],
    ids=["digit", "cut at a line", "line twice", "zero byte", "empty"],
)
def test_damaged_rows_are_noticed(damage: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, EXPECTED, with_digest=True)
    assert is_intact(path) and read_rows(path) == EXPECTED
    path.write_text(damage(path.read_text()))
    assert not is_intact(path) and not path.exists()


def test_rows_without_their_digest_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, EXPECTED, with_digest=True)
    digest_path(path).unlink()
    assert not is_intact(path)


def test_failed_rows_are_reported_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    def make(index: int) -> dict[str, Any]:
        if index in (2, 5, 6, 7, 8):
            raise RowFailed("too long" if index == 2 else "bad", code="row.bad")
        return {"n": index}

    with raises("rewards.rows-failed", DataError, where=str(path)) as error:
        run(path, make, workers=2)
    shown = str(error.value)
    assert "5 of 12 rows" in shown and "made" in shown
    assert "1 rows (r2): too long" in shown and "4 rows (r5, r6, r7): bad" in shown
    assert not path.exists()
    made: list[int] = []
    assert run(path, lambda i: made.append(i) or {"n": i}) == EXPECTED
    assert sorted(made) == [2, 5, 6, 7, 8]


def test_a_service_that_is_down_is_not_called_for_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable_rows, "_GIVE_UP", 4)
    asked: list[int] = []

    def make(index: int) -> dict[str, Any]:
        asked.append(index)
        if index > 2:
            raise RowFailed("no answer", code="endpoint.timeout", service=True)
        return {"n": index}

    with raises("endpoint.failing", RunError) as error:
        run(tmp_path / "out.jsonl", make)
    assert error.value.what.startswith("4 ") and "no answer" in error.value.what
    assert asked == list(range(7))
    assert run(tmp_path / "out.jsonl") == EXPECTED


def test_failures_of_rows_do_not_count_as_failures_of_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable_rows, "_GIVE_UP", 4)

    def make(index: int) -> dict[str, Any]:
        raise RowFailed("no", code="endpoint.timeout", service=index % 3 > 0)

    with raises("rewards.rows-failed", DataError) as error:
        run(tmp_path / "out.jsonl", make)
    assert "12 of 12" in error.value.what


class Group:
    """Ranks as threads, with the interface of `rpo_trainer.runtime.distributed`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.local = threading.local()
        self.wall = threading.Barrier(size, timeout=20)
        self.box: list[Any] = [None] * size

    def rank(self) -> int:
        return int(self.local.rank)

    def world_size(self) -> int:
        return self.size

    def barrier(self) -> None:
        self.wall.wait()

    def _share(self, value: Any) -> list[Any]:
        self.box[self.rank()] = value
        self.wall.wait()
        found = list(self.box)
        self.wall.wait()
        return found

    def raise_on_all_ranks(self) -> Any:
        group = self

        class Together:
            def __enter__(self) -> None:
                pass

            def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
                first = next((e for e in group._share(error) if e is not None), None)
                if first is not None:
                    raise first
                return True

        return Together()

    def all_gather_dict(self, values: dict[Any, Any]) -> dict[Any, Any]:
        return {k: v for part in self._share(values) for k, v in part.items()}

    def on_main(self, do: Any) -> Any:
        return self._share(do() if self.rank() == 0 else None)[0]

    def run(self, work: Any) -> list[Any]:
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = work(self)
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_several_processes_share_the_rows_and_go_on_in_another_number(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    made: list[int] = []

    def make(index: int) -> dict[str, Any]:
        if index in broken:
            raise RowFailed("bad", code="row.bad")
        made.append(index)
        return {"n": index}

    broken = {4, 9}
    errors = Group(3).run(lambda ranks: run(path, make, ranks=ranks))
    assert all("2 of 12" in with_code(error, "rewards.rows-failed").what for error in errors)
    assert sorted(made) == [i for i in range(12) if i not in broken]
    assert len(list(tmp_path.glob("out.jsonl.partial*"))) == 3
    broken = set()
    assert Group(2).run(lambda ranks: run(path, make, ranks=ranks)) == [EXPECTED] * 2
    assert sorted(made) == list(range(12))
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_work_may_come_in_any_order(tmp_path: Path) -> None:
    def work(pending: Sequence[int], shard: Shard) -> Iterator[Done]:
        assert shard == (0, 1)
        for index in reversed(pending):
            yield Done(index, {"n": index})

    rows = map_rows_resumable(tmp_path / "o.jsonl", ROWS, work, key="k", what="made")
    assert rows == EXPECTED


def test_keys_follow_content() -> None:
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key("a", 1) != content_key("a", 2)


SLOW = """
import sys, time
from pathlib import Path
from rpo_trainer.data.resumable_rows import map_rows_resumable, one_by_one
def make(i):
    time.sleep(0.01)
    return {"n": i * i}
rows = [{"id": str(i)} for i in range(60)]
map_rows_resumable(Path(sys.argv[1]), rows, one_by_one(make, 4), key="k", what="made")
"""


def test_killed_at_any_moment_and_started_again(tmp_path: Path, injected: Injected) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    command = [sys.executable, "-c", SLOW]
    subprocess.run([*command, str(whole)], check=True)
    kills = 0
    for _ in range(30):
        process = subprocess.Popen([*command, str(path)])
        deadline = time.monotonic() + 120
        before = _size(path)
        while process.poll() is None and _size(path) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.03)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if path.exists():
            break
    assert kills >= 2
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]
    injected(f"SIGKILL while rows are made, {kills} times", "survived")


def _size(path: Path) -> int:
    found = partial_path(path)
    return found.stat().st_size if found.exists() else 0


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.here = threading.local()
        self.meeting = threading.Barrier(world, timeout=30)
        self.given: dict[int, Any] = {}

    def rank(self) -> int:
        return int(self.here.rank)

    def world_size(self) -> int:
        return self.world

    def barrier(self) -> None:
        self.meeting.wait()

    def gather(self, value: Any) -> list[Any]:
        self.given[self.rank()] = value
        self.meeting.wait()
        found = [self.given[rank] for rank in range(self.world)]
        self.meeting.wait()
        return found

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        error = None
        try:
            yield
        except (DataError, RunError) as raised:
            error = raised
        for each in self.gather(error):
            if each is not None:
                raise each

    def on_main(self, do: Callable[[], Any]) -> Any:
        result = None
        with self.raise_on_all_ranks():
            result = do() if self.rank() == 0 else None
        return self.gather(result)[0]

    def all_gather_dict(self, values: dict[Any, Any]) -> dict[Any, Any]:
        return {key: value for part in self.gather(values) for key, value in part.items()}

    def run(self, work: Callable[[], Any]) -> list[Any]:
        """Return the results or errors of all ranks."""
        found: list[Any] = [None] * self.world

        def on(rank: int) -> None:
            self.here.rank = rank
            try:
                found[rank] = work()
            except (DataError, RunError) as error:
                found[rank] = error

        threads = [threading.Thread(target=on, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return found


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kept", [0, 5, 12])
def test_ranks_share_the_work_and_all_get_the_rows(world: int, kept: int, tmp_path: Path) -> None:
    ranks, path, made = Threads(world), tmp_path / "out.jsonl", []

    def make(index: int) -> dict[str, Any]:
        made.append((ranks.rank(), index))
        return {"n": index}

    partial_path(path, 7).write_bytes(b"".join(map(line, range(kept))))  # of an earlier start
    found = ranks.run(lambda: run(path, make, ranks=ranks))
    assert found == [EXPECTED] * world
    assert sorted(index for _, index in made) == [*range(kept, 12)]
    assert all((index - kept) % world == rank for rank, index in made)
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_ranks_do_not_hold_the_results_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results pass through the files: nothing but failures and errors is exchanged."""
    exchanged: list[Any] = []
    gather = Threads.gather
    monkeypatch.setattr(
        Threads, "gather", lambda self, value: exchanged.append(value) or gather(self, value)
    )
    ranks = Threads(2)
    found = ranks.run(lambda: run(tmp_path / "out.jsonl", ranks=ranks))
    assert found == [EXPECTED] * 2 and not any(exchanged)


def test_a_failure_of_one_rank_is_that_of_all(tmp_path: Path) -> None:
    ranks, path = Threads(2), tmp_path / "out.jsonl"

    def make(index: int) -> dict[str, Any]:
        if index == 3:
            raise RowFailed("no", code="x.y")
        return {"n": index}

    found = ranks.run(lambda: run(path, make, ranks=ranks))
    assert [error.code for error in found] == ["rewards.rows-failed"] * 2
    assert ranks.run(lambda: run(path, ranks=ranks)) == [EXPECTED] * 2


def test_a_directory_that_ranks_do_not_share_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, path = Threads(2), tmp_path / "out.jsonl"
    monkeypatch.setattr(
        resumable_rows,
        "partial_path",
        lambda path, rank: partial_path(path.parent / str(rank) / path.name, rank),
    )
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    for error in ranks.run(lambda: run(path, ranks=ranks)):
        assert (error.code, error.where) == ("output.results-missing", str(tmp_path))
