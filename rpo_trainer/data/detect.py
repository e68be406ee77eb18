"""Select the format of a source: the named one, or the first whose required columns are present."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rpo_trainer.data.columns import mapping_for
from rpo_trainer.data.formats import COMMON, FORMATS, PROMPT_FORMATS, Format
from rpo_trainer.data.rows import Kind
from rpo_trainer.errors import DataError


@dataclass(frozen=True)
class _Refused:
    """A known format that no stage can train on, and the error for it."""

    columns: tuple[str, ...]
    what: str
    code: str
    why: str
    fix: str

    def error(self, where: str) -> DataError:
        """Return the error for a source with these columns."""
        return DataError(self.what, code=self.code, where=where, why=self.why, fix=self.fix)


_COMPARED = "preference stages compare two responses to the same prompt"
REFUSED = (
    _Refused(
        ("completion", "label"),
        "unpaired labels (KTO) are not supported",
        code="data.unpaired-labels",
        why=_COMPARED,
        fix="pair a good completion with a bad one for each prompt; or, for SFT, keep the rows whose "
        "`label` is true and remove that column",
    ),
    _Refused(
        ("kto_tag",),
        "unpaired labels (KTO, `kto_tag`) are not supported",
        code="data.unpaired-labels",
        why=_COMPARED,
        fix="pair a good output with a bad one for each prompt; or, for SFT, keep the rows whose `kto_tag` "
        "is true and remove that column",
    ),
    _Refused(
        ("completions", "labels"),
        "labels of solution steps (process rewards) are not supported",
        code="data.step-labels",
        why=_COMPARED,
        fix="for SFT, join the steps of correct solutions into one `completion`",
    ),
)
ONLY_PROMPTS = _Refused(
    ("prompt",),
    "the rows have prompts but no responses",
    code="data.no-responses",
    why=_COMPARED,
    fix="add responses, or sample them in the stage: `data: {generate: ..., score: ...}`",
)


_PURPOSE = {"sft": "SFT", "pair": "preferences", "rating": "ratings", "prompt": "prompts"}


def find_format(columns: Collection[str], kind: Kind, name: str | None, where: str) -> Format:
    """Return the named format, or the first one whose required columns are all present.

    Raises:
        DataError: the name is unknown or of another kind, or no format fits the columns.
    """
    table = PROMPT_FORMATS if kind == "prompt" else FORMATS
    if name is not None:
        return _named_format(table, name, kind, where)
    for refused in REFUSED if kind != "prompt" else ():
        if set(refused.columns) <= set(columns):
            raise refused.error(where)
    for format in table.values():
        if format.kind == kind and format.fits(columns):
            return format
    if kind == "pair" and not set(columns) - {"prompt", *COMMON}:
        raise ONLY_PROMPTS.error(where)
    other = next((n for n, f in FORMATS.items() if all(c in columns for c in f.required)), None)
    raise DataError(
        f"the columns {', '.join(sorted(columns))} match no format for {_PURPOSE[kind]}",
        code="data.unrecognized-columns",
        where=where,
        why=f"they match {other!r}, which is for {_PURPOSE[FORMATS[other].kind]}"
        if other
        else None,
        fix=f"map the columns to those of a format: {_nearest(table, kind, columns)} (or give --column "
        "OURS=THEIRS to a command); formats, described in docs/data.md: "
        + ", ".join(n for n, f in table.items() if f.kind == kind),
    )


def _nearest(table: Mapping[str, Format], kind: Kind, columns: Collection[str]) -> str:
    """Return an example of `columns` for the format with the fewest missing columns."""
    usual = {"sft": "prompt_response", "pair": "pairs", "rating": "score", "prompt": "prompt"}
    found = []
    for name, format in table.items():
        if format.kind != kind:
            continue
        needed = list(format.required)
        if format.prompts and not set(format.prompts) & set(columns):
            needed.insert(0, "prompt")
        missing = [column for column in needed if column not in columns]
        mapping = mapping_for(missing, set(columns) - set(needed))
        lack = (mapping.count("NAME"), name != usual[kind], len(missing))
        found.append((lack, f"{mapping} for {name!r}"))
    return min(found)[1]


def kind_of(columns: Collection[str]) -> Kind | None:
    """Return the kind of the first format that fits these columns without joining rows; None if none fits."""
    for format in FORMATS.values():
        if not format.together and all(column in columns for column in format.required):
            return format.kind
    return None


def _named_format(table: Mapping[str, Format], name: str, kind: Kind, where: str) -> Format:
    known = [n for n, f in table.items() if f.kind == kind]
    if name in known:
        return table[name]
    if kind == "prompt" and name in FORMATS and "prompt" in FORMATS[name].required:
        return table["prompt"]
    near = difflib.get_close_matches(name, known, n=1)
    raise DataError(
        f"unknown format {name!r} for {_PURPOSE[kind]}"
        + (f"; did you mean {near[0]!r}?" if near else ""),
        code="data.unknown-format",
        where=where,
        fix=f"use one of: {', '.join(known)}",
    )
