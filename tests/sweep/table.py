"""Writes docs/models.md from the records of a sweep, and reads it back."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.families import FAMILIES, VARIANTS
from tests.sweep.measure import Result

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

_LAYOUTS = {  # fastest first
    "shared": "shared prompts", "packed": "packed", "padded": "padded", "single": "single",
}  # fmt: skip
_HEADS = ("fused", "own logits")
_FAILED = ("wrong", "crash")

_HEAD = """# Models

{counts}

Measured with transformers {transformers} and torch {torch}. A family is the `model_type` of a config. Each
family is tested on a small random model, twice: with windows and chunks of a few tokens, and with long ones
and rows that exceed them. Log-probs and gradients of a DPO step, of a LoRA adapter and of a reward model are
compared with forward passes of one response at a time, in float64 if the model supports it, and a saved model
is loaded again. This page is generated: `python -m benchmarks.models --write`.

- **layout**: how rows are arranged. *Shared prompts*: the responses to a prompt share a row, and the prompt
  is computed once. *Packed*: one row, with the prompt once for each response. *Padded*: one response per row,
  as in other trainers. *Single*: one response per forward pass, for attention that selects tokens and would
  also select padding. The trainer uses the fastest layout that is exact for the model at hand; a family whose
  layout depends on the length of its windows has both.
- **head**: *fused*: log-probs without the full logits matrix. *Own logits*: the model's forward computes it.
- **LoRA**: whether `target_modules: all-linear` trains and merges. *Not the experts*: the weights of the
  experts are not linear layers, so `all-linear` does not train them (see `target_parameters` of PEFT).
- **reward model**: whether the family can be trained as one. *No class*: transformers has no sequence
  classifier for it. *Another head*: its classifier is not a decoder with one linear layer.
"""
_COLUMNS = ("families", "layout", "head", "LoRA", "reward model", "notes")
_SECTIONS = {
    "trained": "",
    "refused": "The trainers stop with the reason before training.",
    "not swept": "No small model of these families can be created or compared. The trainers check them.",
    "wrong": "These must not be trained.",
}


class Row(NamedTuple):
    """The columns of the page for a family."""

    section: str
    layout: str = ""
    head: str = ""
    lora: str = ""
    reward: str = ""
    notes: str = ""


# --- from records ---


def failures(result: Result) -> list[str]:
    """The faults in a record; those that ended with an error that is not for users."""
    parts = {"": result, "LoRA: ": result.get("lora"), "reward model: ": result.get("reward")}
    return [
        f"{name}{part['result']}: {part['reason']}"
        for name, part in parts.items()
        if part and part["result"] in _FAILED
    ]


def row_of(results: Iterable[Result]) -> Row:
    """Return the row of one family, from its records of both reaches."""
    by_reach = {result["reach"]: result for result in results}
    narrow, wide = by_reach["narrow"], by_reach["wide"]
    failed = [*failures(narrow), *failures(wide)]
    if failed:
        return Row("wrong", notes=_plain("; ".join(dict.fromkeys(failed))))
    if wide["result"] != "ok":
        return Row(wide["result"], notes=_reason(wide))
    return Row(
        "trained",
        _both(_layout(wide), _layout(narrow)),
        _both(_head(wide), _head(narrow)),
        _lora(narrow),
        _reward(narrow),
        "; ".join(_notes(narrow, wide)),
    )


def _layout(result: Result) -> str:
    return _LAYOUTS[result["layout"]] if result["result"] == "ok" else ""


def _head(result: Result) -> str:
    return _HEADS[not result["fused"]] if result["result"] == "ok" else ""


def _both(wide: str, narrow: str) -> str:
    return wide if narrow in ("", wide) else f"{wide}; short windows: {narrow}"


def _lora(result: Result) -> str:
    found = result.get("lora")
    if found is None or found["result"] != "ok":
        return "no" if found else ""
    return "yes, not the experts" if found["untrained_experts"] else "yes"


def _reward(result: Result) -> str:
    found = result.get("reward")
    if found is None or found["result"] == "ok":
        return "yes" if found else ""
    return "another head" if found["has_class"] else "no class"


def _notes(narrow: Result, wide: Result) -> list[str]:
    notes = []
    if narrow["result"] != "ok":
        notes.append(f"short windows: {narrow['result']}, {_reason(narrow)}")
    if (lora := narrow.get("lora")) and lora["result"] == "refused":
        notes.append(f"LoRA: {_reason(lora)}")
    if wide["loads_by"] == "class":
        notes.append(f"a saved model is loaded by `{wide['class']}`, not by an auto class")
    return notes


def _reason(result: Result) -> str:
    """Return the reason of a refusal as a line, without details of this model."""
    why = result.get("why")
    text = f"{result['reason']}: {why}" if why else result["reason"]
    name = re.escape(result.get("class", "\n"))
    return _plain(re.sub(rf"\b(?:an? )?{name}", "the model", text))


def _plain(text: str) -> str:
    """Return the first clause without its numbers, which depend on the machine."""
    text = re.sub(r"\s*\([^)]*\)|\[[^\]]*\]\s*", "", " ".join(text.split()))
    text = re.split(r"; |\. ", text)[0].replace("|", "/")
    text = re.sub(r"(?<![\w.:-])-?\d+(\.\d+)?(e[+-]?\d+)?(?![\w.]*\w)", "…", text)
    return text if len(text) <= 200 else text[:199] + "…"


# --- the page ---


def incomplete(results: Sequence[Result]) -> str:
    """Return the cases that a page needs and the records lack."""
    have = {(result["name"], result["reach"]) for result in results}
    missing = [
        f"{name} ({reach})"
        for name in (*FAMILIES, *VARIANTS)
        for reach in ("narrow", "wide")
        if (name, reach) not in have
    ]
    return ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")


def rows_of(results: Iterable[Result]) -> dict[str, Row]:
    """Return the rows by name, sorted."""
    by_name: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_name[result["name"]].append(result)
    rows = {name: row_of(by_name[name]) for name in sorted(by_name)}
    return {name: _as_setting(row) if name in VARIANTS else row for name, row in rows.items()}


def _as_setting(row: Row) -> Row:
    told = row.section in ("trained", "wrong")  # what is wrong says so
    return row._replace(
        section="settings", notes=row.notes if told else f"{row.section}: {row.notes}"
    )


def page(results: Sequence[Result]) -> str:
    """Return the entire page."""
    rows = rows_of(results)
    families = {name: row for name, row in rows.items() if name not in VARIANTS}
    variants = {name: row for name, row in rows.items() if name in VARIANTS}
    versions = {name: results[0][name] for name in ("transformers", "torch")}
    lines = [_HEAD.format(counts=_counts(families), **versions)]
    for section, text in _SECTIONS.items():
        found = {name: row for name, row in families.items() if row.section == section}
        if found:
            lines += [f"## {section.capitalize()}", "", *([text, ""] if text else [])]
            lines += [*_table(found), ""]
    lines += ["## Settings", "", "Settings of a family that change the step.", ""]
    return "\n".join([*lines, *_table(variants), ""])


def _counts(rows: Mapping[str, Row]) -> str:
    sections = Counter(row.section for row in rows.values())
    trained = [row for row in rows.values() if row.section == "trained"]
    layouts = Counter(row.layout.split(";")[0] for row in trained)
    fused = sum(row.head.startswith(_HEADS[0]) for row in trained)
    return (
        f"Of the {len(rows)} families of causal language models in transformers, "
        f"{sections['trained']} can be trained: "
        + ", ".join(f"{layouts[name]} {name}" for name in _LAYOUTS.values())
        + f"; {fused} with the fused head, {sum(row.lora.startswith('yes') for row in trained)} with LoRA on "
        f"all linear layers, {sum(row.reward == 'yes' for row in trained)} as reward models. "
        + ", ".join(
            f"{sections[name]} {'is' if sections[name] == 1 else 'are'} {name}"
            for name in ("refused", "not swept", "wrong")
        )
        + "."
    )


def _table(rows: Mapping[str, Row]) -> list[str]:
    """Join rows with the same text, the fastest layouts first."""
    groups: dict[Row, list[str]] = defaultdict(list)
    for name, row in rows.items():
        groups[row].append(name)
    # Empty columns are omitted.
    used = [i for i in range(1, len(_COLUMNS)) if any(row[i] for row in groups)]
    lines = [
        "| " + " | ".join([_COLUMNS[0], *(_COLUMNS[i] for i in used)]) + " |",
        "|---" * (len(used) + 1) + "|",
    ]
    for row in sorted(groups, key=lambda row: (*_rank(row), *row)):
        names = ", ".join(f"`{name}`" for name in groups[row])
        lines.append("| " + " | ".join([names, *(row[i] for i in used)]) + " |")
    return lines


def _rank(row: Row) -> tuple[int, int]:
    first = row.layout.split(";")[0]
    order = list(_LAYOUTS.values())
    return order.index(first) if first in order else len(order), not row.head.startswith(_HEADS[0])


# --- back from the page ---


def documented(text: str) -> tuple[dict[str, Row], dict[str, str]]:
    """Return rows by name, and the versions of transformers and torch that they were measured with."""
    rows: dict[str, Row] = {}
    section, columns = "", [""]
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").lower()
        elif line.startswith("| families"):
            columns = _cells(line)
        elif line.startswith("| "):
            names, *cells = _cells(line)
            fields = {_field(name): cell for name, cell in zip(columns[1:], cells, strict=True)}
            rows |= {name: Row(section, **fields) for name in re.findall(r"`([^`]+)`", names)}
    versions = re.search(r"transformers (\S+) and torch (\S+)\. ", text)
    assert versions is not None
    return rows, {"transformers": versions[1], "torch": versions[2]}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _field(column: str) -> str:
    return {"LoRA": "lora", "reward model": "reward"}.get(column, column)


def line_of(result: Result) -> str:
    """Return a record as one line for readers."""
    what = result["result"]
    if "layout" in result:
        what += f" {result['layout']}, {_HEADS[not result['fused']]}"
    for name in ("lora", "reward"):
        if name in result:
            what += f"; {name} {result[name]['result']}"
    reasons = failures(result) or [result.get("reason", "")]
    off = (
        f"log-probs {result['logps_off']:.0e}, gradient {result['gradient_off']:.0e}"
        if "gradient_off" in result
        else ""
    )
    parts = (what, off, "; ".join(reasons), f"{result.get('seconds', 0):.1f} s")
    return f"{result['name']:26}{result['reach']:8}" + " | ".join(filter(None, parts))
