"""The run directory: chain.json, its lock, and what may change between two starts."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rpo_trainer.errors import RunError

CHAIN_FILE = "chain.json"
METRICS_FILE = "metrics.jsonl"
_LOCK = ".lock"
_HOLDER = ".lock-holder"
_VERSION = 1

# Stage fields that say how a stage runs, not what it computes: these may change when a run goes on.
SAFE_FIELDS = frozenset(
    {
        "micro_batch_size",
        "micro_batch_tokens",
        "gradient_checkpointing",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "report_to",
        "step0_check",
        "eval",
    }
)


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    with staged.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)


class ChainState:
    """chain.json: one record for each stage, written whole at every change."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / CHAIN_FILE
        self.stages: list[dict[str, Any]] = []
        self.model: dict[str, Any] = {}
        self.seed: int | None = None
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            if content["version"] != _VERSION:
                raise ValueError(f"its version is {content['version']}, not {_VERSION}")
            self.stages, self.model = list(content["stages"]), dict(content["model"])
            self.seed = int(content["seed"])
            for record in self.stages:
                if not {"name", "state", "spec"} <= record.keys():
                    raise ValueError("a stage lacks its name, state or spec")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"the state of the run cannot be read: {error!r}",
                where=str(self.path),
                fix="restore the file, or start in another directory (--run-dir)",
            ) from error

    def save(self) -> None:
        """Writes the file whole or not at all."""
        content = {
            "version": _VERSION,
            "model": self.model,
            "seed": self.seed,
            "stages": self.stages,
        }
        write_whole(self.path, json.dumps(content, indent=1))

    def stage(self, name: str) -> dict[str, Any] | None:
        """The record of a stage by name."""
        return next((record for record in self.stages if record["name"] == name), None)

    def adopt(self, stages: list[dict[str, Any]], model: dict[str, Any], seed: int) -> None:
        """Takes over a recipe's stages; records of stages that have begun are kept.

        Args:
            stages: the specs of all stages as plain data, `name` among them.

        Raises:
            RunError: something that has already been computed with has changed.
        """
        begun = [record for record in self.stages if record["state"] != "pending"]
        if begun:
            self._refuse_changes(begun, stages, model, seed)
        known = {record["name"]: record for record in begun}
        self.stages = [
            {**known.get(spec["name"], {"state": "pending"}), **_head(spec), "spec": spec}
            for spec in stages
        ]
        self.model, self.seed = model, seed

    def _refuse_changes(
        self,
        begun: list[dict[str, Any]],
        stages: list[dict[str, Any]],
        model: dict[str, Any],
        seed: int,
    ) -> None:
        changes = differences("model", self.model, model)
        changes += differences("seed", self.seed, seed)
        specs = {spec["name"]: spec for spec in stages}
        for record in begun:
            name = record["name"]
            if name not in specs:
                changes.append(f"stages.{name}: has begun, and is no longer in the recipe")
                continue
            old = {k: v for k, v in record["spec"].items() if k not in SAFE_FIELDS}
            new = {k: v for k, v in specs[name].items() if k not in SAFE_FIELDS}
            changes += differences(f"stages.{name}", old, new)
        if changes:
            raise RunError(
                "the recipe has changed where this run has already computed:\n    "
                + "\n    ".join(changes),
                where=str(self.path.parent),
                why="going on would mix two recipes in one run",
                fix="undo the change, or start in a new directory (--run-dir)",
            )


def differences(key: str, old: Any, new: Any) -> list[str]:
    """`key: old → new` for every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        return [
            line
            for name in names
            for line in differences(f"{key}.{name}", old.get(name), new.get(name))
        ]
    return [] if old == new else [f"{key}: {json.dumps(old)} → {json.dumps(new)}"]


def _head(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": spec["name"],
        "kind": spec["kind"],
        "init": spec["init"],
        "reference": spec.get("reference"),
    }


def open_run_dir(run_dir: Path) -> None:
    """Makes the directory, or checks that it is one of ours.

    Raises:
        RunError: it holds something else, or cannot be written.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise RunError(
            "this is a file, not a directory", where=str(run_dir), fix="name another --run-dir"
        )
    others = (
        [p for p in run_dir.iterdir() if not p.name.startswith(".")] if run_dir.is_dir() else []
    )
    if others and not (run_dir / CHAIN_FILE).is_file():
        raise RunError(
            f"the directory is not empty and is no run of ours ({others[0].name} lies in it)",
            where=str(run_dir),
            why="a run must never mix with other files",
            fix="name an empty or new directory with --run-dir",
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".write-test"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"the directory cannot be written: {error.strerror}",
            where=str(run_dir),
            fix="name another --run-dir, or change its rights",
        ) from error


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the run directory; the lock goes with the process, however it ends."""
    lock = FileLock(run_dir / _LOCK)
    holder = run_dir / _HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = holder.read_text() if holder.is_file() else "another process"
        raise RunError(
            f"the run directory is in use by {who}",
            where=str(run_dir),
            fix="wait for it, stop it, or name another --run-dir",
        ) from error
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def forget_metrics(path: Path, stage: str, after_step: int, *, evaluated: bool = True) -> None:
    """Drops the lines of a stage beyond the step it goes on from, so that no step stands twice.

    Args:
        evaluated: keep the evaluation at that step; False: it will be done again.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line cut by a kill
        step = row.get("step", 0)
        again = step > after_step or (step == after_step and not evaluated and "eval_loss" in row)
        if row.get("stage") != stage or not again:
            kept.append(line + "\n")
    write_whole(path, "".join(kept))
