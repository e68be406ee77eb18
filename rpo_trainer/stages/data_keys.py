"""Content keys of a stage's prepared data: digests of everything that the rows and their tokens depend on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo_trainer.data.resumable_rows import content_key
from rpo_trainer.data.sources import may_be_hub_name
from rpo_trainer.errors import DataError
from rpo_trainer.recipe import is_local, resolve_path
from rpo_trainer.runtime.files import atomic_write, known_digest, tree_digest
from rpo_trainer.stages.hub import hub_commit

if TYPE_CHECKING:
    from rpo_trainer.recipe import SourceSpec, Stage

# Fields of a stage that its rows and examples depend on.
DATA_FIELDS = (
    "kind", "objective", "data", "max_length", "truncation", "attributes", "rating_range",
    "reward_scale", "margin_scale",
)  # fmt: skip
# Fields of `data` that scored rows replace.
_SCORED_FIELDS = ("train", "dedup", "generate", "score", "responses_from", "resample")


def stage_settings(stage: Stage, *, scored: bool = False) -> dict[str, Any]:
    """Return the settings of a stage that its rows and examples depend on, without seed and evaluation.

    Args:
        scored: whether the key also has a digest of scored rows, which replace the sources. All rounds that
            use the same responses then have the same settings.
    """
    found: dict[str, Any] = {
        name: value for name, value in stage.model_dump(mode="json").items() if name in DATA_FIELDS
    }
    if scored:
        found["data"] = {k: v for k, v in found["data"].items() if k not in _SCORED_FIELDS}
    return found


class SourceDigests:
    """Digests of the data sources of a recipe.

    A digest is computed once and then stays the same, so that all stages of a run are prepared from the
    same content. An index file keeps the digests of files that have not been modified.

    Args:
        base_dir: the recipe's directory.
        index: a JSON file; None: keep nothing.

    Attributes:
        found: digests by the name of the source in the recipe; those of the main process hold for all.
    """

    def __init__(self, base_dir: Path, index: Path | None) -> None:
        self.base_dir = base_dir
        self.index = index
        self._known: dict[str, dict[str, Any]] = {}
        self.found: dict[str, str] = {}
        if index is not None:
            with suppress(OSError, ValueError):
                self._known = dict(json.loads(index.read_text(encoding="utf-8")))

    def of(self, sources: Iterable[SourceSpec]) -> list[Any]:
        """Return JSON-compatible values that change when a source, or how it is read, changes."""
        return [
            [source.model_dump(mode="json"), source.model_kwargs, self._content(source)]
            for source in sources
        ]

    def local(self, sources: Iterable[SourceSpec]) -> dict[str, str]:
        """Return the xxh3-128 digests of the local files and directories, by their paths in the recipe."""
        paths = [source.path for source in sources if source.path is not None]
        return {
            path: self._of(path) for path in paths if resolve_path(self.base_dir, path).exists()
        }

    def _content(self, source: SourceSpec) -> str:
        return "generated" if source.path is None else self._of(source.path)

    def _of(self, name: str) -> str:
        if name not in self.found:
            path = resolve_path(self.base_dir, name)
            if not is_local(name, path):
                self.found[name] = _of_hub(name)
            elif path.is_file():
                self.found[name] = self._of_file(path)
            else:
                self.found[name] = tree_digest(path, self._of_file)
        return self.found[name]

    def _of_file(self, path: Path) -> str:
        name = content_key(str(path.resolve()))
        try:
            found = known_digest(path, self._known.get(name))
        except OSError as error:
            raise DataError(
                f"cannot be read ({error.strerror or error})",
                code="data.unreadable-file",
                where=str(path),
                fix="check the permissions of the file",
            ) from None
        if found != self._known.get(name):
            self._known[name] = found
            self._write()
        return str(found["digest"])

    def _write(self) -> None:
        if self.index is not None and self.index.parent.is_dir():
            with suppress(OSError):  # only saves time
                atomic_write(self.index, json.dumps(self._known, indent=1))


def _of_hub(name: str) -> str:
    """Return the commit of a data set on the hub; if it is not known, a value that equals no other."""
    commit = hub_commit(name, None, "dataset") if may_be_hub_name(name) else None
    return commit or f"unknown {uuid.uuid4()}"
