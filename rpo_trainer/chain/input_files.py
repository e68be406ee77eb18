"""The files outside the run directory that stages read, and whether they have changed.

When a stage begins, the digests of its inputs are recorded in chain.json; every start of the run compares
them: weights, configs, tokenizers and chat templates of every directory in the recipe (including the base
model of an adapter), data, judge templates, task files, engine configs. For a model or data set on the hub,
the commit is recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpo_trainer.chain.changes import covers, ways_out
from rpo_trainer.chain.state import ChainState
from rpo_trainer.errors import RunError
from rpo_trainer.models.adapter_files import base_of, is_adapter
from rpo_trainer.recipe import (
    DataSpec,
    EvalSpec,
    GenerateSpec,
    Recipe,
    ScoreSpec,
    SourceSpec,
    Stage,
    is_local,
    resolve_path,
)
from rpo_trainer.runtime.files import in_threads, known_digest
from rpo_trainer.stages.hub import RepoKind, hub_commit
from rpo_trainer.stages.inputs import evaluation_of
from rpo_trainer.stages.record import FileRecord, InputRecord, Reach
from rpo_trainer.stages.settings import named_files
from rpo_trainer.trainers.manifest import MANIFEST

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_OF_MODELS = (".json", ".jinja", ".model", ".tiktoken", ".py", *_WEIGHTS)
_TEXTS = ("merges.txt", "vocab.txt")
_NOT_READ = (MANIFEST, "trainer_state.json", "all_results.json", "train_results.json")
_TEMPLATES = "additional_chat_templates"
_SHOWN = 6


@dataclass(frozen=True)
class Input:
    """A file, directory or hub repository that a stage reads.

    Attributes:
        key: the recipe key that names it, as `--allow-changed` takes it.
        name: its name in the recipe.
        path: its path; None: on the hub.
        reach: which files of a directory are read.
        repo, revision, kind: the hub repository.
    """

    key: str
    name: str
    path: Path | None
    reach: Reach = "all"
    repo: str | None = None
    revision: str | None = None
    kind: RepoKind = "model"


class InputFiles:
    """The inputs of the stages of a recipe.

    Args:
        stages: all stages, in order.
    """

    def __init__(self, recipe: Recipe, stages: Sequence[Stage], base_dir: Path) -> None:
        self.recipe = recipe
        self.base_dir = base_dir
        self.stages = {stage.name: stage for stage in stages}
        self.order = list(stages)

    def of(self, stage: Stage) -> list[Input]:
        """Return the inputs of a stage without duplicates; `model` reach includes `tokenizer` reach."""
        found: dict[tuple[str, str], Input] = {}
        for one in self._all(stage):
            before = found.get((one.key, one.name))
            if before is None or (before.reach == "tokenizer" and one.reach == "model"):
                found[one.key, one.name] = one
        return list(found.values())

    def _all(self, stage: Stage) -> Iterator[Input]:
        own = f"stages.{stage.name}"
        model = self.recipe.model
        if model.tokenizer is None:
            yield from self._model("tokenizer")
        elif model.tokenizer != "characters":
            yield from self._named("model.tokenizer", model.tokenizer, "tokenizer")
        # A chat template file is compared with the recipe (`state.plain`).
        for field, source in stage.models_read.items():
            yield from self._weights(f"{own}.{field}", source)
        yield from self._data(f"{own}.data", stage.data)
        for name, file in named_files(stage.training_args):
            yield Input(f"{own}.training_args.{name}", file, Path(file).expanduser())
        if (measured := evaluation_of(stage, self.recipe)) is not None:
            yield from self._evaluation(*measured)

    def _weights(self, key: str, source: str) -> Iterator[Input]:
        """Yield the inputs of a source: `model`, a directory, or the base of a stage's kept adapter."""
        if source == "model":
            yield from self._model("model")
        elif (stage := self.stages.get(source)) is None:
            yield from self._named(key, source, "model")
        elif stage.peft is not None and stage.peft.between_stages == "keep":
            yield from self._weights(f"stages.{stage.name}.init", stage.init)

    def _model(self, reach: Reach) -> Iterator[Input]:
        if (name := self.recipe.model.name_or_path) is not None:
            revision = self.recipe.model.revision
            yield from self._named("model.name_or_path", name, reach, revision)

    def _named(
        self, key: str, name: str, reach: Reach, revision: str | None = None
    ) -> Iterator[Input]:
        folder = resolve_path(self.base_dir, name)
        if is_local(name, folder):
            yield Input(key, name, folder, reach)
        else:
            yield Input(key, name, None, reach, name, revision)
        if reach == "model" and folder.is_dir() and is_adapter(folder):
            base, label = base_of(folder), f"{name}, base {base_of(folder)}"
            if is_local(base, Path(base)):
                yield Input(key, label, Path(base), reach)
            else:
                yield Input(key, label, None, reach, base)

    def _data(self, key: str, data: DataSpec) -> Iterator[Input]:
        yield from self._sources(f"{key}.train", data.train)
        yield from self._sources(f"{key}.eval", data.eval)
        for other in (data.responses_from, data.replay.stage if data.replay else None):
            if other in self.stages:
                of_other = self.stages[other].data
                yield from self._data(f"stages.{other}.data", of_other)
        if data.generate is not None:
            yield from self._policies(f"{key}.generate", data.generate)
        if data.score is not None:
            yield from self._scorer(f"{key}.score", data.score)

    def _sources(self, key: str, sources: Sequence[SourceSpec]) -> Iterator[Input]:
        for number, source in enumerate(sources):
            if source.path is None:
                continue
            path = resolve_path(self.base_dir, source.path)
            if is_local(source.path, path):
                yield Input(f"{key}.{number}", source.path, path)
            else:
                yield Input(f"{key}.{number}", source.path, None, repo=source.path, kind="dataset")

    def _policies(self, key: str, spec: GenerateSpec) -> Iterator[Input]:
        for number, name in enumerate(spec.policies):
            if name != "init":  # an input already
                yield from self._weights(f"{key}.policies.{number}", name)

    def _scorer(self, key: str, spec: ScoreSpec) -> Iterator[Input]:
        if spec.model is not None:
            yield from self._weights(f"{key}.model", spec.model)
        if spec.judge is not None and spec.judge.template is not None:
            yield self._file(f"{key}.judge.template", spec.judge.template)

    def _evaluation(self, key: str, spec: EvalSpec) -> Iterator[Input]:
        for field in ("data", "preferences", "nll"):
            yield from self._sources(f"{key}.{field}", getattr(spec, field))
        if spec.baseline is not None:
            yield from self._weights(f"{key}.baseline", spec.baseline)
        if spec.generate is not None:
            yield from self._policies(f"{key}.generate", spec.generate)
        if spec.score is not None:
            yield from self._scorer(f"{key}.score", spec.score)
        if spec.lm_eval is not None and spec.lm_eval.include_path is not None:
            yield self._file(f"{key}.lm_eval.include_path", spec.lm_eval.include_path)

    def _file(self, key: str, name: str) -> Input:
        return Input(key, name, resolve_path(self.base_dir, name))


class Digests:
    """Computes digests of inputs; a file is read again only if it has been modified.

    Args:
        known: inputs recorded by earlier starts.
    """

    def __init__(self, known: Iterable[InputRecord] = ()) -> None:
        self._files: dict[tuple[str, str], FileRecord] = {
            (entry.name, name): file
            for entry in known
            for name, file in (entry.files or {}).items()
        }
        self._commits: dict[tuple[str, str | None, RepoKind], str | None] = {}

    def of(self, inputs: Sequence[Input]) -> list[InputRecord]:
        """Return the records of the inputs that exist.

        Raises:
            RunError: a file cannot be read.
        """
        found = []
        for one in inputs:
            commit = self._hub(one) if one.repo is not None else None
            files = self._local(one, one.path) if one.repo is None else None
            if commit or files:
                found.append(InputRecord(one.key, one.name, one.reach, files or None, commit))
        return found

    def _local(self, one: Input, path: Path | None) -> dict[str, FileRecord]:
        assert path is not None  # not on the hub
        try:
            names = sorted(_files(path, one.reach))
            files = in_threads(lambda name: self._file(one, path, name), names)
        except OSError as error:
            raise RunError(
                f"an input cannot be read: {error.strerror or error}",
                code="run.unreadable-input",
                where=f"{one.key}: {error.filename or path}",
                why="its digest is recorded, so that a change is detected on resume",
                fix="check the file and its permissions",
            ) from error
        return dict(zip(names, files, strict=True))

    def _file(self, one: Input, path: Path, name: str) -> FileRecord:
        place = (one.name, name)
        known = self._files.get(place)
        found = known_digest(
            path if path.is_file() else path / name, known.to_json() if known else None
        )
        self._files[place] = FileRecord(**found)
        return self._files[place]

    def _hub(self, one: Input) -> str | None:
        assert one.repo is not None
        place = (one.repo, one.revision, one.kind)
        if place not in self._commits:
            self._commits[place] = hub_commit(*place)
        return self._commits[place] or None


def _files(path: Path, reach: Reach) -> Iterator[str]:
    """Yield the names of the files that are read, relative to the directory."""
    if path.is_file():
        yield path.name
    if not path.is_dir():
        return
    if reach == "all":
        yield from (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return
    for file in [*path.iterdir(), *(path / _TEMPLATES).glob("*.jinja")]:
        name = file.name
        read = name.endswith(_OF_MODELS) or name in _TEXTS
        skipped = name in _NOT_READ or name.startswith(".") or not file.is_file()
        if read and not skipped and not (reach == "tokenizer" and _is_weights(name)):
            yield file.relative_to(path).as_posix()


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS)


def check_input_files(
    stages: Sequence[Stage],
    state: ChainState,
    inputs: InputFiles,
    run_dir: Path,
    *,
    verify: bool = False,
) -> None:
    """Compare the inputs of the stages that have begun with their recorded digests.

    Allowed changes are recorded in the history of the run.

    Args:
        verify: read all files; False: those that have been modified.

    Raises:
        RunError: an input has changed that may not change.
    """
    started = [
        (stage, record)
        for stage in stages
        if (record := state.stage(stage.name)) is not None and record.state != "pending"
    ]
    known = (entry for _, record in started for entry in record.inputs or ())
    digests = Digests(() if verify else known)
    refused: dict[str, dict[str, None]] = {}  # changed files by key
    allowed: dict[tuple[str, str], tuple[Any, Any]] = {}
    for stage, record in started:
        now = {(entry.key, entry.name): entry for entry in digests.of(inputs.of(stage))}
        entries = []
        for before in record.inputs or ():
            # If the recipe now names another input, `ChainState.adopt` has compared that.
            entry = now.get((before.key, before.name), before)
            changed = changed_parts(before, entry)
            if changed and not _may_change(state, stage, entry.key):
                refused.setdefault(entry.key, {}).update(dict.fromkeys(changed))
            allowed |= {(entry.key, name): values for name, values in changed.items()}
            entries.append(_joined(before, entry))
        if entries:
            record.inputs = entries
    if refused:
        lines = [f"{key}: {_listed(list(names))}" for key, names in refused.items()]
        raise RunError(
            "inputs have changed since this run read them:\n    " + "\n    ".join(lines),
            code="run.input-changed",
            where=str(run_dir),
            why="new results would not match the existing ones",
            fix=ways_out("restore them", list(dict.fromkeys(map(_short, refused)))),
        )
    for (key, name), (old, new) in allowed.items():
        state.note(f"{key}: {name}", old, new)


def changed_parts(before: InputRecord, now: InputRecord) -> dict[str, tuple[Any, Any]]:
    """Return the old and new digests that differ between two records of one input, by name."""
    if before.commit is not None or now.commit is not None:
        old, new = before.commit, now.commit
        return {f"{now.name} (commit)": (old, new)} if old != new else {}
    files = [entry.files or {} for entry in (before, now)]
    if before.reach != now.reach:  # only one of them has digests of the weights
        files = [{n: f for n, f in each.items() if not _is_weights(n)} for each in files]
    old_files, new_files = files
    found = {}
    for file in sorted({*old_files, *new_files}):
        old, new = (each[file].digest if file in each else None for each in (old_files, new_files))
        if old != new:
            single = now.name.endswith(file)
            place = now.name if single else f"{now.name}/{file}"
            how = " (missing)" if new is None else " (new)" if old is None else ""
            found[place + how] = (old, new)
    return found


def _joined(before: InputRecord, now: InputRecord) -> InputRecord:
    """Return the new record, with the weights of the old one if only that has them."""
    if before.reach == "model" and now.reach == "tokenizer" and before.files is not None:
        weights = {n: f for n, f in before.files.items() if _is_weights(n)}
        return replace(before, files={**weights, **(now.files or {})})
    return now


def _may_change(state: ChainState, stage: Stage, key: str) -> bool:
    own_data = key.startswith(f"stages.{stage.name}.data.")
    return covers(state.allowed, key) or (own_data and state.allows_other_data(stage.name))


def _short(key: str) -> str:
    """Return the key to allow: for one data source, the key of all of them."""
    return re.sub(r"(\.train|\.eval)?\.\d+$", "", key)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f", and {more} more" if more > 0 else "")
