"""The run directory: chain.json, its lock, and what may change between two starts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from rpo_trainer.chain.changes import (
    Change,
    computed_with,
    covers,
    differences,
    is_fixed,
    require_key,
    ways_out,
)
from rpo_trainer.errors import RunError
from rpo_trainer.recipe import resolve_path
from rpo_trainer.runtime.files import (
    atomic_write,
    file_digest,
    json_digest,
    make_folder,
    remove_empty,
)
from rpo_trainer.stages.record import CHAIN_FILE, RECIPE_FILE, ChangeRecord, StageRecord

if TYPE_CHECKING:
    from rpo_trainer.recipe import Recipe, Stage

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_HOLDER = ".lock-holder"
_VERSION = 1
# What the examples of a stage are made with
_EXAMPLE_FIELDS = (
    "data", "max_length", "truncation", "seed", "init", "attributes", "rating_range",
)  # fmt: skip
_TOKENIZER_FIELDS = (
    "name_or_path", "revision", "tokenizer", "chat_template", "chat_template_kwargs",
)  # fmt: skip
_LIBRARIES = ("rpo-trainer", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed")


class ChainState:
    """chain.json: one record for each stage, written whole at every change.

    Attributes:
        stages: the records, in order.
        changes: what was changed on purpose between starts, the oldest first.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / CHAIN_FILE
        self.stages: list[StageRecord] = []
        self.model: dict[str, Any] = {}
        self.seed: int | None = None
        self.changes: list[ChangeRecord] = []
        self.allowed: tuple[str, ...] = ()
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            if content["version"] != _VERSION:
                raise ValueError(f"its version is {content['version']}, not {_VERSION}")
            if content.pop("digest", None) not in (None, json_digest(content)):
                raise ValueError("its checksum does not match its content")
            for entry in content["stages"]:
                if not {"name", "state", "spec"} <= entry.keys():
                    raise ValueError("a stage lacks its name, state or spec")
                self.stages.append(StageRecord.from_json(entry))
            self.model, self.seed = dict(content["model"]), int(content["seed"])
            self.changes = [ChangeRecord.from_json(entry) for entry in content.get("changes", ())]
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
        ) as error:  # fmt: skip
            raise RunError(
                f"the state of the run cannot be read: {error!r}",
                code="run.unreadable-state",
                where=str(self.path),
                why="it records what has been computed, and from what",
                fix="restore the file, or start in another directory (--run-dir)",
            ) from error

    def save(self) -> None:
        """Writes the file whole or not at all."""
        content: dict[str, Any] = {
            "version": _VERSION,
            "model": self.model,
            "seed": self.seed,
            "stages": [record.to_json() for record in self.stages],
        }
        if self.changes:
            content["changes"] = [change.to_json() for change in self.changes]
        content["digest"] = json_digest(content)
        atomic_write(self.path, json.dumps(content, indent=1))

    def stage(self, name: str) -> StageRecord | None:
        """The record of a stage by name."""
        return next((record for record in self.stages if record.name == name), None)

    def adopt(
        self,
        stages: list[dict[str, Any]],
        model: dict[str, Any],
        seed: int,
        evaluation: Mapping[str, Any] | None = None,
        *,
        allowed: Collection[str] = (),
    ) -> None:
        """Takes over a recipe's stages; records of stages that have begun are kept.

        Args:
            stages: the specs of all stages as plain data, `name` among them.
            evaluation: the recipe's `eval`, whose files may be allowed to change.
            allowed: keys of the recipe that may have changed, with all that is below them.

        Raises:
            RecipeError: an allowed key is none of the recipe.
            RunError: something that has already been computed with has changed.
        """
        for key in allowed:
            require_key(key, stages, model, evaluation)
        self.allowed = tuple(allowed)
        begun = [record for record in self.stages if record.state != "pending"]
        if begun:
            self._note_changes(begun, stages, model, seed)
        known = {record.name: record for record in begun}
        self.stages = [
            dataclasses.replace(
                known.get(spec["name"], StageRecord()), name=spec["name"], kind=spec["kind"],
                init=spec["init"], reference=spec.get("reference"), spec=spec,
            )
            for spec in stages
        ]  # fmt: skip
        self.model, self.seed = model, seed

    def _note_changes(
        self,
        begun: list[StageRecord],
        stages: list[dict[str, Any]],
        model: dict[str, Any],
        seed: int,
    ) -> None:
        """Notes the changes that are allowed; refuses all others at once."""
        changes = differences("model", self.model, model)
        changes += differences("seed", self.seed, seed)
        fixed = [change for change in changes if is_fixed(change.key)]
        lines = []
        specs = {spec["name"]: spec for spec in stages}
        for record in begun:
            name = record.name
            if name not in specs:
                lines.append(f"stages.{name}: has begun, and is no longer in the recipe")
                continue
            old, new = computed_with(record.spec), computed_with(specs[name])
            found = differences(f"stages.{name}", old, new)
            fixed += [change for change in found if is_fixed(change.key, name)]
            changes += found
        refused = [c for c in changes if c in fixed or not covers(self.allowed, c.key)]
        lines = [*map(str, refused), *lines]
        if lines:
            keys = [change.key for change in refused if change not in fixed]
            raise RunError(
                "the recipe has changed where this run has already computed:\n    "
                + "\n    ".join(lines),
                code="run.recipe-changed",
                where=str(self.path.parent),
                why="resuming would mix two recipes in one run",
                fix=ways_out("undo the change", keys),
            )
        for change in changes:
            self.note(*change)

    def note(self, key: str, old: Any, new: Any) -> None:
        """Keeps a change that was allowed in the history of the run; it is saved with the next save."""
        logger.warning("allowed: %s. Existing results are kept", Change(key, old, new))
        self.changes.append(ChangeRecord(now(), key, old, new))

    def allows_other_data(self, stage: str) -> bool:
        """Whether the examples of a stage may be others: by its data, or anything they are made with."""
        own = f"stages.{stage}"
        made_with = [f"{own}.{field}" for field in _EXAMPLE_FIELDS]
        made_with += [f"model.{field}" for field in _TOKENIZER_FIELDS]
        return any(
            key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.")
            for key in self.allowed
            for one in ("seed", *made_with)
        )


def now() -> str:
    """The time as the files of a run have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def plain(
    recipe: Recipe, stages: Sequence[Stage], base_dir: Path
) -> tuple[list[dict[str, Any]], dict[str, Any], int, dict[str, Any] | None]:
    """Of a recipe what `ChainState.adopt` takes: the specs of its stages, its model, seed and `eval`.

    Where the chat template is a file, its name is followed by a digest of its text.
    """
    specs = [stage.model_dump(mode="json") for stage in stages]
    model = recipe.model.model_dump(mode="json")
    if recipe.model.chat_template is not None:
        template = resolve_path(base_dir, recipe.model.chat_template)
        if template.is_file():
            model["chat_template"] += f" ({file_digest(template)[:12]})"
    evaluation = None if recipe.eval is None else recipe.eval.model_dump(mode="json")
    return specs, model, recipe.seed, evaluation


def check_run_dir(run_dir: Path) -> None:
    """Checks that the directory is a run, or that there is none yet.

    Raises:
        RunError: it holds something else, or cannot be read.
    """
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise RunError(
                "this is a file, not a directory",
                code="run.not-a-directory",
                where=str(run_dir),
                why="a run is a directory of its own",
                fix="name another --run-dir",
            )
        others = (
            [p for p in run_dir.iterdir() if not p.name.startswith(".")] if run_dir.is_dir() else []
        )
        ours = (run_dir / CHAIN_FILE).is_file()
    except (OSError, ValueError) as error:
        raise _unusable("read", error, run_dir) from error
    if others and not ours:
        raise RunError(
            f"this is not an rpo-trainer run directory: it contains {others[0].name}",
            code="run.not-a-run-directory",
            where=str(run_dir),
            why="a run does not share its directory with other files",
            fix="name an empty or new directory with --run-dir",
        )


def _unusable(how: str, error: Exception, run_dir: Path) -> RunError:
    return RunError(
        f"the directory cannot be {how}: {getattr(error, 'strerror', None) or error}",
        code="run.unusable-directory",
        where=str(run_dir),
        why="checkpoints and outputs could not be written either",
        fix="name another --run-dir, or change its permissions",
    )


def open_run_dir(run_dir: Path) -> list[Path]:
    """Makes the directory, or checks that it is a run.

    Returns:
        The directories that are new, the innermost first.

    Raises:
        RunError: it holds something else, or cannot be written.
    """
    check_run_dir(run_dir)
    new: list[Path] = []
    try:
        new = make_folder(run_dir)
        probe = run_dir / ".write-test"
        probe.write_text("")
        probe.unlink()
    except (OSError, ValueError) as error:
        remove_empty(new)
        raise _unusable("written", error, run_dir) from error
    return new


@contextmanager
def locked(run_dir: Path, *, new: Sequence[Path] = ()) -> Iterator[None]:
    """Holds the run directory; the lock goes with the process, however it ends.

    Args:
        new: directories that were made for this: they are removed if nothing was written into them.
    """
    lock = FileLock(run_dir / _LOCK)
    holder = run_dir / _HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = _holder(holder) or "another process"
        raise RunError(
            f"the run directory is in use by {who}",
            code="run.locked",
            where=str(run_dir),
            why="two runs in one directory would mix their checkpoints",
            fix="wait for it, stop it, or name another --run-dir",
        ) from error
    except OSError as error:
        raise RunError(
            f"the lock of the run directory cannot be taken: {error.strerror or error}",
            code="run.unusable-lock",
            where=str(run_dir / _LOCK),
            why="two runs in one directory would mix their checkpoints",
            fix="remove what is there under this name, or name another --run-dir",
        ) from error
    if holder.is_file():
        logger.warning(
            "the previous process of %s (%s) died; taking over its lock", run_dir, _holder(holder)
        )
    try:
        try:
            atomic_write(holder, f"process {os.getpid()} on {socket.gethostname()}")
        except OSError as error:
            raise _unusable("written", error, run_dir) from error
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        with suppress(OSError):  # the directory may be gone
            if {path.name for path in run_dir.iterdir()} <= {_LOCK}:  # nothing was done
                (run_dir / _LOCK).unlink(
                    missing_ok=True
                )  # while it is held: nobody else can hold it
        lock.release()
        remove_empty(new)


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def forget_metrics(path: Path, stage: str, after_step: int, *, evaluated: bool = True) -> None:
    """Drops the lines of a stage beyond the step it resumes from, so that no step is there twice.

    Args:
        evaluated: keep the evaluation at that step; False: it will be done again.
    """
    if not path.is_file():
        return
    kept, unread = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):
            unread += 1  # cut by a kill, or harmed since
            continue
        step = row.get("step", 0)
        again = step > after_step or (step == after_step and not evaluated and "eval_loss" in row)
        if row.get("stage") != stage or not again:
            kept.append(line + "\n")
    if unread:
        logger.warning("%d lines of %s could not be read and were left out", unread, path)
    atomic_write(path, "".join(kept))


def library_versions() -> dict[str, str]:
    """What computes here, by name; libraries that are not installed are left out."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_recipe(run_dir: Path, resolved: str) -> None:
    """`recipe.yaml`: the recipe as it runs, under the versions of the libraries."""
    versions = [f"# {name} {version}\n" for name, version in library_versions().items()]
    atomic_write(run_dir / RECIPE_FILE, "".join(versions) + resolved)
