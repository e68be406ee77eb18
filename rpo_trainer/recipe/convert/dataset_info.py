"""Convert datasets of LLaMA-Factory (entries of dataset_info.json) to sources of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe.convert.foreign_config import ForeignConfig
from rpo_trainer.recipe.convert.paths import Paths
from rpo_trainer.runtime.files import read_text

FILE_NAME = "dataset_info.json"
_MAX_BYTES = 2**23
_READ_BYTES = 2**26  # the columns of larger files are not read
# LLaMA-Factory's name of a column → the name here, and its default name in the rows.
_ALPACA = {
    "prompt": ("instruction", "instruction"),
    "query": ("input", "input"),
    "response": ("output", "output"),
    "history": ("history", None),
}
_SHARED = {"system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected"}
_MEDIA = ("images", "videos", "audios")
# Supported tags of messages; the first is the default of LLaMA-Factory.
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool", "function", "function_response", "ipython"),
    "function_tag": ("function_call", "assistant", "gpt"),
    "system_tag": ("system", "developer"),
}
_ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_READ = (
    "file_name", "hf_hub_url", "formatting", "ranking", "columns", "tags", "split", "num_samples",
)  # fmt: skip


@dataclass
class DatasetInfo:
    """The datasets of a config.

    Attributes:
        config: the config.
        paths: paths of the config and the recipe.
        folder: directory of dataset_info.json; None if there is none.
        entries: its content.
    """

    config: ForeignConfig
    paths: Paths
    folder: Path | None
    entries: Mapping[str, Any]

    @staticmethod
    def find(config: ForeignConfig, paths: Paths) -> DatasetInfo:
        """Read dataset_info.json in `dataset_dir`, else next to the config.

        Raises:
            RecipeError: it cannot be read.
        """
        named = str(config.take("dataset_dir", "data"))
        folder = paths.find(named)
        for candidate in (folder, config.path.absolute().parent):
            if candidate is None or not (candidate / FILE_NAME).is_file():
                continue
            file = candidate / FILE_NAME
            try:
                entries = json.loads(read_text(file, _MAX_BYTES))
            except (OSError, ValueError, RecursionError) as error:
                raise RecipeError(
                    f"cannot be read as JSON: {error}",
                    code="convert.bad-dataset-info",
                    where=str(file),
                    fix="correct the file",
                ) from None
            if isinstance(entries, dict):
                return DatasetInfo(config, paths, candidate, entries)
        return DatasetInfo(config, paths, None, {})

    def sources(self, key: str, *, pairs: bool) -> tuple[list[dict[str, Any]], list[Path | None]]:
        """Return the sources of `dataset` or `eval_dataset`, and the local file of each.

        Args:
            key: the key of the config that names the datasets.
            pairs: the stage compares responses.
        """
        found, files = [], []
        for name in self.config.names(key):
            source, file = self._source(key, name, pairs)
            found.append(source)
            files.append(file)
        return found, files

    def _source(self, key: str, name: str, pairs: bool) -> tuple[dict[str, Any], Path | None]:
        entry = self.entries.get(name)
        if not isinstance(entry, dict):
            where = "no dataset_info.json was found" if self.folder is None else (
                f"{self.folder / FILE_NAME} does not define it"
            )  # fmt: skip
            self.config.differs(key, f"{where}: replace the path `{name}` with the data file")
            return {"path": name}, None
        if "kto_tag" in _mapping(entry.get("columns")):
            raise self.config.unsupported(
                key, "KTO data (`kto_tag`)", "use pairs of responses with `stage: dpo`"
            )
        if media := [name for name in _MEDIA if name in _mapping(entry.get("columns"))]:
            raise self.config.unsupported(
                key, f"data with {media[0]}", "use a text model and rows of text"
            )
        notes = self.config.below(FILE_NAME, entry, name)
        for field in _READ:
            notes.take(field)
        source, file = self._place(entry, notes)
        if entry.get("ranking") and not pairs:
            self.config.differs(
                key, f"`{name}` has pairs; an SFT stage requires rows with one response"
            )
        if bool(entry.get("ranking")) < pairs:
            self.config.differs(key, f"the entry of `{name}` does not say `ranking: true`")
        if entry.get("formatting", "alpaca") == "alpaca":
            source |= self._alpaca(entry, pairs)
            columns = _mapping(entry.get("columns"))
            if columns and "query" not in columns and "input" in _columns_of(file):
                notes.differs(
                    "columns",
                    "LLaMA-Factory ignores the column `input`, because the entry does not list it; here it "
                    "is added to the instruction, unless you remove it from the rows",
                )
        else:
            source |= self._sharegpt(entry, notes, pairs)
        if entry.get("num_samples") is not None:
            source["max_rows"] = int(entry["num_samples"])
        notes.leave_out_rest(
            {
                "subset": "configurations of hub datasets cannot be selected; save the rows to a file",
                "folder": "folders of hub datasets cannot be selected; save the rows to a file",
                "revision": "revisions of hub datasets cannot be selected; save the rows to a file",
            }
        )
        return source, file

    def _place(
        self, entry: Mapping[str, Any], notes: ForeignConfig
    ) -> tuple[dict[str, Any], Path | None]:
        if entry.get("file_name") is not None and entry.get("hf_hub_url") is None:
            assert self.folder is not None
            file = self.folder / str(entry["file_name"])
            notes.take("split")  # a file has none
            if not file.exists():
                notes.differs("file_name", f"{file} does not exist; correct the path")
            elif file.is_dir():
                notes.differs(
                    "file_name", f"{file} is a directory: name each of its files as a source"
                )
            return {"path": self.paths.of_recipe(file)}, file
        if entry.get("hf_hub_url") is not None:
            split = {"split": str(entry["split"])} if entry.get("split") else {}
            return {"path": str(entry["hf_hub_url"]), **split}, None
        place = next((field for field in _ELSEWHERE if entry.get(field)), "file_name")
        notes.leave_out(
            place, "only local files and datasets on the Hugging Face hub are supported"
        )
        return {"path": str(entry.get(place, "PATH"))}, None

    def _alpaca(self, entry: Mapping[str, Any], pairs: bool) -> dict[str, Any]:
        columns = _mapping(entry.get("columns"))
        usual = {theirs: ours for theirs, (ours, _) in _ALPACA.items()} | _SHARED
        mapping = {}
        for theirs, name in columns.items():
            ours = usual.get(theirs)
            if ours is not None and name is not None and name != ours:
                mapping[ours] = str(name)
        source: dict[str, Any] = {"format": "pairs" if pairs else "alpaca"}
        return source | ({"columns": mapping} if mapping else {})

    def _sharegpt(
        self, entry: Mapping[str, Any], notes: ForeignConfig, pairs: bool
    ) -> dict[str, Any]:
        columns = _mapping(entry.get("columns"))
        column = str(columns.get("messages", "conversations"))
        mapping = {
            ours: str(columns[theirs])
            for theirs, ours in _SHARED.items()
            if columns.get(theirs) not in (None, ours)
        }
        if column not in ("conversations", "messages"):
            mapping["messages"] = column
        tags = notes.below("tags", _mapping(entry.get("tags")))
        for tag, known in _TAGS.items():
            value = tags.take(tag, known[0])
            if str(value).lower() not in known:
                tags.leave_out(
                    tag, f"messages must have {' or '.join(known)}: rename it in the rows"
                )
        tags.leave_out_rest({})
        form = "pairs" if pairs else ("sharegpt" if column == "conversations" else "messages")
        return {"format": form} | ({"columns": mapping} if mapping else {})


def _columns_of(file: Path | None) -> set[str]:
    """Return the columns of the first row of a local JSON file; empty if it cannot be read cheaply."""
    try:
        if file is None or not file.is_file() or file.stat().st_size > _READ_BYTES:
            return set()
        text = read_text(file, _READ_BYTES)
        row = json.loads(text.partition("\n")[0] if file.suffix == ".jsonl" else text)
    except (OSError, ValueError, RecursionError):
        return set()
    first = row[0] if isinstance(row, list) and row else row
    return set(first) if isinstance(first, dict) else set()


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
