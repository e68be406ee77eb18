"""The format of a source: the one that is named, or the first that its columns fit."""

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
    """Rows that are known, and why nothing here can be made of them."""

    columns: tuple[str, ...]
    what: str
    code: str
    why: str
    fix: str

    def error(self, where: str) -> DataError:
        """The error for a source with these columns."""
        return DataError(self.what, code=self.code, where=where, why=self.why, fix=self.fix)


_COMPARED = "preference stages compare responses to the same prompt"
REFUSED = (
    _Refused(
        ("completion", "label"),
        "unpaired true/false labels (KTO) cannot be trained on here",
        code="data.unpaired-labels",
        why=f"one response with a label has nothing to be compared with; {_COMPARED}",
        fix="pair each prompt's good completion with a bad one; or, for SFT, keep the rows "
        "whose label is true and remove the column `label`",
    ),
    _Refused(
        ("kto_tag",),
        "unpaired good/bad labels (KTO, `kto_tag`) cannot be trained on here",
        code="data.unpaired-labels",
        why=f"one response with a label has nothing to be compared with; {_COMPARED}",
        fix="pair each prompt's good output with a bad one; or, for SFT, keep the rows whose kto_tag is true "
        "and remove the column `kto_tag`",
    ),
    _Refused(
        ("completions", "labels"),
        "labels for the steps of an answer (process rewards) cannot be trained on here",
        code="data.step-labels",
        why=f"a label of a step says nothing of whole responses; {_COMPARED}",
        fix="for SFT, join the steps of right answers to one `completion`",
    ),
)
ONLY_PROMPTS = _Refused(
    ("prompt",),
    "the rows have prompts and no responses",
    code="data.no-responses",
    why=_COMPARED,
    fix="let the stage sample responses: `data: {generate: ..., score: ...}`, or add the responses",
)


_PURPOSE = {"sft": "SFT", "pair": "preferences", "rating": "ratings", "prompt": "prompts"}


def find_format(columns: Collection[str], kind: Kind, name: str | None, where: str) -> Format:
    """The named format, or the first one whose required columns are all there.

    Raises:
        DataError: unknown name, a format of another kind, or columns of no known format.
    """
    table = PROMPT_FORMATS if kind == "prompt" else FORMATS
    if name is not None:
        return _named_format(table, name, kind, where)
    for refused in REFUSED if kind != "prompt" else ():
        if set(refused.columns) <= set(columns):
            raise refused.error(where)
    for format in table.values():
        if format.kind == kind and all(column in columns for column in format.required):
            return format
    if kind == "pair" and not set(columns) - {"prompt", *COMMON}:
        raise ONLY_PROMPTS.error(where)
    other = next((n for n, f in FORMATS.items() if all(c in columns for c in f.required)), None)
    raise DataError(
        f"the columns {', '.join(sorted(columns))} are of no format known for {_PURPOSE[kind]}",
        code="data.unrecognized-columns",
        where=where,
        why=f"they look like {other!r}, which is for {_PURPOSE[FORMATS[other].kind]}"
        if other
        else "which column is the prompt, and which the response, cannot be guessed",
        fix=f"name the columns with `columns: {{ours: theirs}}`{_nearest(table, kind, columns)}; known: "
        + "; ".join(f"{n} ({', '.join(f.required)})" for n, f in table.items() if f.kind == kind),
    )


def _nearest(table: Mapping[str, Format], kind: Kind, columns: Collection[str]) -> str:
    """An example of `columns` for the format that lacks least, its names guessed."""
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
        found.append((lack, f", for example {mapping} for {name!r}"))
    return min(found)[1]


def kind_of(columns: Collection[str]) -> Kind | None:
    """The kind of the first format that these columns fit, a row by itself; None: of no format."""
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
        f"no format {name!r} for {_PURPOSE[kind]}"
        + (f"; did you mean {near[0]!r}?" if near else ""),
        code="data.unknown-format",
        where=where,
        why="each format reads other columns, and none is guessed",
        fix=f"format: {' | '.join(known)}",
    )
