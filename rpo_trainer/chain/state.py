"""chain.json: the state of a run and its stages, and the changes allowed between two starts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
)
from rpo_trainer.stages.record import CHAIN_FILE, RECIPE_FILE, ChangeRecord, StageRecord

if TYPE_CHECKING:
    from rpo_trainer.recipe import Recipe, Stage

logger = logging.getLogger(__name__)

_VERSION = 1
# The examples of a stage depend on these.
_EXAMPLE_FIELDS = (
    "data", "max_length", "truncation", "seed", "init", "attributes", "rating_range",
)  # fmt: skip
_TOKENIZER_FIELDS = (
    "name_or_path", "revision", "tokenizer", "chat_template", "chat_template_kwargs",
)  # fmt: skip
_LIBRARIES = ("rpo-trainer", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed")


class ChainState:
    """chain.json: one record per stage, rewritten at every change.

    Attributes:
        stages: the records, in order.
        changes: the changes allowed between starts, oldest first.
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
                raise ValueError(f"version {content['version']}, expected {_VERSION}")
            if content.pop("digest", None) not in (None, json_digest(content)):
                raise ValueError("checksum mismatch")
            for entry in content["stages"]:
                if not {"name", "state", "spec"} <= entry.keys():
                    raise ValueError("a stage has no name, state or spec")
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
                fix="restore the file from a backup, or start in another directory (--run-dir)",
            ) from error

    def save(self) -> None:
        """Write the file atomically."""
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
        """Return the record of a stage by name."""
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
        """Set the stages of a recipe, keeping the records of stages that have begun.

        Args:
            stages: the specs of all stages as plain data, including `name`.
            evaluation: the recipe's `eval`, whose files may be allowed to change.
            allowed: keys of the recipe that may have changed, with everything below them.

        Raises:
            RecipeError: an allowed key is not in the recipe.
            RunError: a value that finished or running stages depend on has changed.
        """
        started = [record for record in self.stages if record.state != "pending"]
        before = [record.spec for record in started]  # a key that was removed can be allowed too
        for key in allowed:
            require_key(key, [*stages, *before], [model, self.model], evaluation)
        self.allowed = tuple(allowed)
        if started:
            self._note_changes(started, stages, model, seed)
        known = {record.name: record for record in started}
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
        started: list[StageRecord],
        stages: list[dict[str, Any]],
        model: dict[str, Any],
        seed: int,
    ) -> None:
        """Record allowed changes; raise one error for all others."""
        changes = differences("model", self.model, model)
        changes += differences("seed", self.seed, seed)
        fixed = [change for change in changes if is_fixed(change.key)]
        lines = []
        specs = {spec["name"]: spec for spec in stages}
        for record in started:
            name = record.name
            if name not in specs:
                lines.append(f"stages.{name}: has begun, but is no longer in the recipe")
                continue
            old, new = computed_with(record.spec), computed_with(specs[name])
            differing = differences(f"stages.{name}", old, new)
            fixed += [change for change in differing if is_fixed(change.key, name)]
            changes += differing
        refused = [c for c in changes if c in fixed or not covers(self.allowed, c.key)]
        lines = [*map(str, refused), *lines]
        if lines:
            keys = [change.key for change in refused if change not in fixed]
            raise RunError(
                "the recipe has changed for stages that have begun:\n    " + "\n    ".join(lines),
                code="run.recipe-changed",
                where=str(self.path.parent),
                why="resuming would mix results of two recipes in one run",
                fix=ways_out("undo the change", keys),
            )
        for change in changes:
            self.note(*change)

    def note(self, key: str, old: Any, new: Any) -> None:
        """Record an allowed change in the history of the run; written by the next `save`."""
        logger.warning("change allowed, existing results are kept: %s", Change(key, old, new))
        self.changes.append(ChangeRecord(now(), key, old, new))

    def allows_other_data(self, stage: str) -> bool:
        """Whether the examples of a stage may change: its data, or anything else they depend on."""
        own = f"stages.{stage}"
        made_with = [f"{own}.{field}" for field in _EXAMPLE_FIELDS]
        made_with += [f"model.{field}" for field in _TOKENIZER_FIELDS]
        return any(
            key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.")
            for key in self.allowed
            for one in ("seed", *made_with)
        )


def now() -> str:
    """Return the current time in UTC, as written in the files of a run."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def plain(
    recipe: Recipe, stages: Sequence[Stage], base_dir: Path
) -> tuple[list[dict[str, Any]], dict[str, Any], int, dict[str, Any] | None]:
    """Return the arguments of `ChainState.adopt`: specs of the stages, model, seed and `eval`.

    A chat template file is recorded by its name and a digest of its text.
    """
    specs = [stage.model_dump(mode="json") for stage in stages]
    model = recipe.model.model_dump(mode="json")
    if recipe.model.chat_template is not None:
        template = resolve_path(base_dir, recipe.model.chat_template)
        if template.is_file():
            model["chat_template"] += f" ({file_digest(template)[:12]})"
    evaluation = None if recipe.eval is None else recipe.eval.model_dump(mode="json")
    return specs, model, recipe.seed, evaluation


def forget_metrics(path: Path, stage: str, after_step: int, *, evaluated: bool = True) -> None:
    """Drop the lines of a stage after the step it resumes from, so that no step is logged twice.

    Args:
        evaluated: keep the evaluation at that step; False: it will be repeated.
    """
    if not path.is_file():
        return
    kept, unread = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):
            unread += 1  # truncated by a kill, or damaged
            continue
        step = row.get("step", 0)
        again = step > after_step or (step == after_step and not evaluated and "eval_loss" in row)
        if row.get("stage") != stage or not again:
            kept.append(line + "\n")
    if unread:
        logger.warning("%d unreadable lines of %s were dropped", unread, path)
    atomic_write(path, "".join(kept))


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that results depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_recipe(run_dir: Path, resolved: str) -> None:
    """Write `recipe.yaml`: the resolved recipe, with library versions as comments."""
    versions = [f"# {name} {version}\n" for name, version in library_versions().items()]
    atomic_write(run_dir / RECIPE_FILE, "".join(versions) + resolved)
