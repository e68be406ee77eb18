"""Compute the rows of a file one by one. Results survive a killed process; the file is complete or absent.

Results are appended to `FILE.partial` as they arrive, in any order (see `partial_file`). When the work is
restarted with the same rows and settings, only missing or damaged results are computed, and the file is
identical to that of an uninterrupted run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from rpo_trainer.data.partial_file import PartialFile, partial_path, partial_paths, read_partials
from rpo_trainer.data.rows import Row
from rpo_trainer.errors import DataError, RunError
from rpo_trainer.runtime.files import atomic_write, verify_digest, write_with_digest
from rpo_trainer.runtime.ranks import ALONE, Ranks
from rpo_trainer.runtime.row_progress import RowProgress

logger = logging.getLogger(__name__)

_GIVE_UP = 20  # consecutive failures after which the service, not the rows, is at fault


class RowFailed(Exception):
    """A row has no result.

    Args:
        code: stable identifier of the reason, as for `RPOTrainerError`.
        service: the service failed, not the row.
    """

    def __init__(self, reason: str, *, code: str, service: bool = False) -> None:
        super().__init__(reason)
        self.code = code
        self.service = service


@dataclass(frozen=True)
class Done:
    """Result of the row at `index`: its new fields, or the reason for which there are none."""

    index: int
    fields: dict[str, Any] | None
    failed: RowFailed | None = None


Shard = tuple[int, int]  # (rank, ranks)
Work = Callable[[Sequence[int], Shard], Iterator[Done]]


Assemble = Callable[[Sequence[dict[str, Any]]], list[Row]]

_KEYED = json.JSONEncoder(sort_keys=True, default=str)


def content_key(*parts: Any) -> str:
    """Return the xxh3-64 digest of JSON-compatible values: of the JSON text of the list of all parts.

    The items of a part that is a sequence, such as rows, are read one by one.
    """
    digest = xxhash.xxh3_64(b"[")
    for number, part in enumerate(parts):
        digest.update(b", " if number else b"")
        if isinstance(part, Sequence) and not isinstance(part, str | bytes):
            digest.update(b"[")
            for place, item in enumerate(part):
                digest.update(((", " if place else "") + _KEYED.encode(item)).encode())
            digest.update(b"]")
        else:
            digest.update(_KEYED.encode(part).encode())
    digest.update(b"]")
    return digest.hexdigest()


def map_rows_resumable(
    path: Path,
    rows: Sequence[Row],
    work: Work,
    *,
    key: str,
    what: str,
    label: str = "",
    with_digest: bool = False,
    ranks: Ranks = ALONE,
) -> list[Row]:
    """Add the fields that `work` computes to each row, and write the rows to `path` as JSON lines.

    Args:
        rows: JSON-compatible rows; a result is merged into its row.
        work, key, what, label, with_digest, ranks: see `write_rows_resumable`.
    """
    ids = [str(row.get("id", number)) for number, row in enumerate(rows)]

    def merge(found: Sequence[dict[str, Any]]) -> list[Row]:
        return [{**row, **fields} for row, fields in zip(rows, found, strict=True)]

    return write_rows_resumable(
        path,
        ids,
        work,
        merge,
        key=key,
        what=what,
        label=label,
        with_digest=with_digest,
        ranks=ranks,
    )


def write_rows_resumable(
    path: Path,
    ids: Sequence[str],
    work: Work,
    assemble: Assemble,
    *,
    key: str,
    what: str,
    label: str = "",
    then: Callable[[list[Row]], None] | None = None,
    with_digest: bool = False,
    ranks: Ranks = ALONE,
) -> list[Row]:
    """Compute the results of all units of work, assemble rows from them, and write these to `path` as JSON
    lines.

    Args:
        ids: names of the units in messages.
        work: takes the indices of pending units and this process's shard of them; yields results in any
            order.
        assemble: converts the results of all units, in order, to rows; called on the first process only.
        key: digest of everything the results depend on; unfinished results with another key are refused.
        what: participle that names the work in messages ("scored").
        label: prefix of log messages, such as the name of a stage.
        then: called with the rows after they are written, before the unfinished results are removed.
        with_digest: see `write_rows`.
        ranks: processes that share the work and the directory; all of them must call this function.

    Raises:
        DataError: units have failed; the results of the others are kept.
        RunError: unfinished results of other rows or settings exist, the service is down, or the processes
            do not share the directory.
    """
    prefix = f"{label} " if label else ""
    failures = _Failures(what, ids)
    alone, main = ranks.world_size() == 1, ranks.rank() == 0
    with ranks.raise_on_all_ranks():
        # All processes read before any of them writes: a run may resume with a different number of processes.
        found = read_partials(path, key, len(ids))
    pending = [i for i in range(len(ids)) if i not in found]
    if found and pending:
        logger.info("%s%d of %d rows already %s", prefix, len(found), len(ids), what)
    if not alone:
        found.clear()
    ranks.barrier()
    shard = ranks.rank(), ranks.world_size()
    with ranks.raise_on_all_ranks():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = partial_path(path, ranks.rank())
        done = len(ids) - len(pending)
        with RowProgress(len(ids), f"{prefix}{what}", show=main, done=done) as progress:
            found |= _run_pending(own, key, work, pending, shard, failures, progress)
    failures.reasons = ranks.all_gather_dict(failures.reasons)
    with ranks.raise_on_all_ranks():
        failures.raise_if_any(path)
    rows: list[Row] = []

    def finish() -> None:
        # The results of other processes are read from their files: they need not be in memory everywhere.
        results = found if alone else _from_all_ranks(path, key, len(ids))
        rows.extend(assemble([results[i] for i in range(len(ids))]))
        write_rows(path, rows, with_digest=with_digest)
        if then is not None:
            then(rows)
        for partial in partial_paths(path):
            partial.unlink()

    ranks.on_main(finish)
    return rows if main else read_rows(path)


def _run_pending(
    path: Path,
    key: str,
    work: Work,
    pending: Sequence[int],
    shard: Shard,
    failures: _Failures,
    progress: RowProgress,
) -> dict[int, dict[str, Any]]:
    """Do this process's shard of the pending work, and write each result as it arrives.

    Returns:
        The results by index; none if there are other processes.
    """
    found: dict[int, dict[str, Any]] = {}
    if not pending:
        return found
    partial = PartialFile(path, key)
    try:
        for done in work(pending, shard):
            if done.failed is not None:
                failures.add(done.index, done.failed)
            else:
                assert done.fields is not None
                if shard[1] == 1:
                    found[done.index] = done.fields
                partial.write(done.index, done.fields)
                failures.in_a_row = 0
            # The other processes have about as many results.
            progress.advance(min(shard[1], len(failures.ids) - progress.done))
    finally:
        partial.close()
    return found


def _from_all_ranks(path: Path, key: str, total: int) -> dict[int, dict[str, Any]]:
    """Return all results from the files of all processes."""
    found = read_partials(path, key, total)
    if len(found) < total:
        raise RunError(
            f"{total - len(found)} of {total} results of other processes are not in the directory",
            code="output.results-missing",
            where=str(path.parent),
            why="the first process assembles the file from the unfinished results of all processes",
            fix="write to a file system that all nodes share, and run the same command again",
        )
    return found


def write_rows(path: Path, rows: Iterable[Row], *, with_digest: bool = False) -> None:
    """Write rows as JSON lines, atomically and synced to disk.

    Args:
        with_digest: also write the digest of the file, for `is_intact`.
    """
    write = write_with_digest if with_digest else atomic_write
    write(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file written by `write_rows`."""
    # Not splitlines(), which also splits at Unicode line separators inside texts.
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def is_intact(path: Path) -> bool:
    """Whether a file written by `write_rows(with_digest=True)` exists and is unchanged.

    A damaged file is removed with a warning.
    """
    if not path.is_file():
        return False
    if (fault := verify_digest(path)) is not None:
        logger.warning("%s is damaged (%s): its rows are recomputed", path, fault)
        path.unlink()
        return False
    return True


@dataclass
class _Failures:
    """Reasons for failed units, by index."""

    what: str
    ids: Sequence[str]
    reasons: dict[int, str] = field(default_factory=dict)
    in_a_row: int = 0

    def add(self, index: int, failed: RowFailed) -> None:
        self.reasons[index] = str(failed)
        self.in_a_row = self.in_a_row + 1 if failed.service else 0
        if self.in_a_row >= _GIVE_UP:
            raise RunError(
                f"{self.in_a_row} consecutive rows failed: {failed}",
                code="endpoint.failing",
                why="the results so far are kept",
                fix="fix the service, and run the same command again",
            )

    def raise_if_any(self, path: Path) -> None:
        if not self.reasons:
            return
        rows: dict[str, list[str]] = {}
        for index, reason in sorted(self.reasons.items()):
            rows.setdefault(reason, []).append(self.ids[index])
        lines = [
            f"{len(ids)} rows ({', '.join(ids[:3])}): {reason}" for reason, ids in rows.items()
        ]
        raise DataError(
            f"{len(self.reasons)} of {len(self.ids)} rows could not be {self.what}\n    "
            + "\n    ".join(lines[:10])
            + (f"\n    and {len(lines) - 10} more reasons" if len(lines) > 10 else ""),
            code="rewards.rows-failed",
            where=str(path),
            why="the results of the other rows are kept",
            fix="run the same command again to retry these rows, or fix or remove them",
        )


def one_by_one(make: Callable[[int], dict[str, Any]], workers: int = 1) -> Work:
    """Return work that computes the fields of each row separately, in `workers` threads."""

    def attempt(index: int) -> Done:
        try:
            return Done(index, make(index))
        except RowFailed as failed:
            return Done(index, None, failed)

    def work(pending: Sequence[int], shard: Shard) -> Iterator[Done]:
        rank, world = shard
        own = pending[rank::world]
        if workers == 1:
            yield from map(attempt, own)
            return
        executor = ThreadPoolExecutor(workers)
        waiting: set[Future[Done]] = set()
        try:
            for index in own:
                waiting.add(executor.submit(attempt, index))
                if len(waiting) >= 2 * workers:  # bounds the number of pending futures
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    return work
