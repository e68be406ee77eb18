"""Convert Axolotl's `datasets` to sources of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpo_trainer.recipe.convert.foreign_config import ForeignConfig, reasons
from rpo_trainer.recipe.convert.paths import Paths

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv")
_LOADERS = ("json", "parquet", "csv", "arrow", "text")
_SPLIT_OF_FILES = "train"
# The prompt of a pair that a strategy reads → our `columns`; the format.
_PAIRS: dict[str, tuple[str, dict[str, str]]] = {
    "intel": ("orca", {}),
    "argilla": ("pairs", {"chosen": "chosen_response", "rejected": "rejected_response"}),
    "argilla_chat": ("pairs", {}),
    "icr": ("pairs", {"instruction": "input"}),
    "prompt_pairs": ("pairs", {"instruction": "prompt"}),
    "ultra": ("pairs", {}),
    "default": ("pairs", {}),
    "passthrough": ("pairs", {}),
}
_FORMER = {
    "intel_apply_chatml": "intel", "apply_chatml": "argilla", "ultra_apply_chatml": "ultra",
    "argilla_apply_chatml": "argilla",
}  # fmt: skip
# Type of SFT rows → format, our `columns`.
_SFT: dict[str, tuple[str, dict[str, str]]] = {
    "alpaca": ("alpaca", {}),
    "gpteacher": ("alpaca", {"output": "response"}),
    "alpaca_chat": ("alpaca", {}),
    "chat_template": ("messages", {}),
    "sharegpt": ("sharegpt", {}),
    "completion": ("text", {}),
}
_QUESTIONS = {"instruction": "question", "output": "answer"}  # alpaca_chat.load_qa
_USER_FIELDS = {
    "field_instruction": "instruction", "field_input": "input", "field_output": "output",
    "field_system": "system", "field_prompt": "instruction", "field_chosen": "chosen",
    "field_rejected": "rejected",
}  # fmt: skip
_LEFT_OUT = reasons(
    [
        ("configurations of hub datasets cannot be selected; save the rows to a file", ("name",)),
        ("revisions of hub datasets cannot be selected; save the rows to a file", ("revision",)),
        ("use `max_rows` to select a part of the rows", ("shards", "shards_idx", "preprocess_shards")),
        ("only assistant turns are trained; set `weight: 0` on turns to exclude",
         ("roles_to_train", "message_field_training", "message_field_training_detail", "train_on_eos")),
        ("the chat template of `model` is used for every source",
         ("chat_template", "chat_template_jinja", "conversation", "eot_tokens")),
        ("rename the keys in the rows", ("field_thinking", "template_thinking_key", "field_tools")),
        ("remove the system turns from the rows", ("drop_system_message",)),
        ("dataset scripts are never run", ("trust_remote_code",)),
    ]
)  # fmt: skip


def convert_sources(
    config: ForeignConfig, key: str, paths: Paths, *, pairs: bool
) -> tuple[list[dict[str, Any]], list[Path | None]]:
    """Return the sources of `datasets` or `test_datasets`, and the local file of each."""
    given = config.take(key, [])
    found: list[dict[str, Any]] = []
    files: list[Path | None] = []
    for number, entry in enumerate(given if isinstance(given, list) else [given]):
        data = entry if isinstance(entry, dict) else {"path": str(entry)}
        below = config.below(key, data, number)
        form = _form(below, pairs)
        for place, file in _places(below, paths):
            found.append({**place, **form})
            files.append(file)
        below.leave_out_rest(_LEFT_OUT)
    return found, files


def _places(entry: ForeignConfig, paths: Paths) -> list[tuple[dict[str, Any], Path | None]]:
    """Return `path` and `split` of each source of an entry."""
    path, split = str(entry.take("path", "")), entry.take("split")
    named = entry.names("data_files")
    kind = entry.take("ds_type")
    local = named if path in _LOADERS or named else [path]
    found: list[tuple[dict[str, Any], Path | None]] = []
    for name in local:
        file = paths.find(name)
        if file is None and name != path:
            file = paths.find(f"{path}/{name}")
        if file is not None:
            if not file.is_dir() and not file.name.endswith(_SUFFIXES):
                entry.leave_out("path", f"files must have a known suffix ({', '.join(_SUFFIXES)})")
            elif file.is_dir() and not any(file.glob("*.json")):
                entry.differs("path", "list each file of the directory as a source")
            if split not in (None, _SPLIT_OF_FILES) and not file.is_dir():
                entry.leave_out("split", "a file has no splits")
            found.append(({"path": paths.of_recipe(file)}, file))
            continue
        if kind is not None or named or name.endswith(_SUFFIXES):
            entry.differs("path", f"`{name}` was not found; correct the path")
        place = {"path": name} | ({"split": str(split)} if split is not None and not named else {})
        found.append((place, None))
    return found


def _form(entry: ForeignConfig, pairs: bool) -> dict[str, Any]:
    """`format` and `columns` of an entry."""
    kind = entry.take("type")
    if isinstance(kind, Mapping):
        return _user_defined(entry, kind, pairs)
    text = str(kind or "")
    if pairs:
        return _pair_form(entry, text)
    name, _, rest = text.replace(":", ".").partition(".")
    if name not in _SFT:
        if kind is None:
            entry.leave_out("type", "tokenized rows (no `type`) are not supported; use text")
        else:
            entry.leave_out(
                "type", "the format is detected from the columns; see `format` in docs/data.md"
            )
        return {}
    form, columns = _SFT[name][0], dict(_SFT[name][1])
    if name == "alpaca_chat" and rest == "load_qa":
        columns = dict(_QUESTIONS)
    if name in ("alpaca", "gpteacher", "alpaca_chat"):
        entry.differs(
            "type", "the chat template renders the rows, without Axolotl's instruction text"
        )
    if name == "completion" and (column := entry.take("field", "text")) != "text":
        columns["text"] = str(column)
    if name in ("chat_template", "sharegpt"):
        default = "messages" if name == "chat_template" else "conversations"
        column = str(entry.take("field_messages", default))
        form = "sharegpt" if column == "conversations" else "messages"
        if column not in ("conversations", "messages"):
            columns["messages"] = column
        _message_keys(entry)
    return {"format": form} | ({"columns": columns} if columns else {})


def _message_keys(entry: ForeignConfig) -> None:
    """Report unsupported keys and roles of messages."""
    mapping = entry.take("message_property_mappings", {})
    keys = dict(mapping) if isinstance(mapping, Mapping) else {}
    for field, name in (("role", "message_field_role"), ("content", "message_field_content")):
        if entry.has(name):
            keys[field] = entry.take(name)
    usual = {"role": ("role", "from"), "content": ("content", "value")}
    for field, theirs in keys.items():
        if theirs not in usual.get(field, (field,)):
            entry.leave_out(
                "message_property_mappings",
                f"rename `{theirs}` to `{field}` in the rows",
            )
    roles = entry.take("roles", {})
    known = {
        "user": ("user", "human"), "assistant": ("assistant", "gpt", "model", "bot"),
        "system": ("system", "developer"), "tool": ("tool", "function", "observation"),
    }  # fmt: skip
    for role, names in roles.items() if isinstance(roles, Mapping) else ():
        listed = names if isinstance(names, list) else [names]
        if strange := [name for name in listed if name not in known.get(role, ())]:
            entry.leave_out("roles", f"rename the role {strange[0]!r} to {role!r} in the rows")


def _pair_form(entry: ForeignConfig, text: str) -> dict[str, Any]:
    name = _FORMER.get(text, text.replace(":", ".").rpartition(".")[2] or text)
    if name not in _PAIRS:
        if text and name != "chat_template" and "bradley_terry" not in text:
            entry.leave_out(
                "type", "the format is detected from the columns; see `format` in docs/data.md"
            )
            return {}
        name = "default"
    form, columns = _PAIRS[name][0], dict(_PAIRS[name][1])
    if name == "passthrough":
        return {"format": form, "special_tokens": "parse"}
    for key, ours in (
        ("field_messages", "messages"), ("field_chosen", "chosen"), ("field_rejected", "rejected"),
    ):  # fmt: skip
        if (column := entry.take(key)) is not None and column != ours:
            columns[ours] = str(column)
    _message_keys(entry)
    return {"format": form} | ({"columns": columns} if columns else {})


def _user_defined(entry: ForeignConfig, kind: Mapping[str, Any], pairs: bool) -> dict[str, Any]:
    below = entry.below("type", kind)
    columns = {}
    for key, ours in _USER_FIELDS.items():
        column = below.take(key)
        if column is not None and str(column) != ours:
            columns[ours] = str(column)
    below.leave_out_rest(
        dict.fromkeys(
            ("format", "no_input_format", "system_format", "prompt_format", "chosen_format",
             "rejected_format", "system_prompt"),
            "the chat template renders the rows; add other text to the rows",
        )
    )  # fmt: skip
    return {"format": "pairs" if pairs else "alpaca"} | ({"columns": columns} if columns else {})
