"""Audit of one data set: what a stage would drop, refuse or train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import quantiles
from rpo_trainer.data.detect import find_format, kind_of
from rpo_trainer.data.formats import FORMATS
from rpo_trainer.data.rows import Kind, Row, is_blank
from rpo_trainer.data.sources import RawSource, load_source
from rpo_trainer.errors import DataError, Problems, RPOTrainerError
from rpo_trainer.recipe import SourceSpec

if TYPE_CHECKING:
    from rpo_trainer.data.rows import Truncation

BINS = 10
UNLIMITED = 2**30
_BAR = 30


_KINDS: dict[Kind, str] = {
    "sft": "rows for SFT",
    "pair": "preference rows",
    "rating": "rated responses",
    "prompt": "prompts",
}


@dataclass
class Findings:
    """The findings of an audit.

    Attributes:
        kind: `sft`, `pair` or `rating`.
        audit: counts of rows, drops and warnings, with the first ids of each.
        faults: errors of rows that cannot be read or rendered, by reason.
        rewards: quantiles and histogram of the rewards; {} without any.
        gaps: the same for the reward gaps.
        length: for pairs, the fraction whose chosen response is longer, and the within-row correlation
            of length (characters) and reward; for ratings, the correlation of length and mean rating; None
            if undefined.
    """

    name: str
    kind: Kind
    audit: Audit
    faults: list[str] = field(default_factory=list)
    rewards: dict[str, Any] = field(default_factory=dict)
    gaps: dict[str, Any] = field(default_factory=dict)
    length: dict[str, float | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as JSON-compatible data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "faults": self.faults,
            "rewards": self.rewards,
            "gaps": self.gaps,
            "length": self.length,
            **self.audit.as_dict(),
        }

    def lines(self) -> list[str]:
        """Return the findings as lines of text."""
        lines = [f"{self.name}: {_KINDS[self.kind]}", *self.audit.summary_lines()]
        lines += [f"fault: {fault}" for fault in self.faults]
        for what, value in self.length.items():
            if value is not None:
                lines.append(_LENGTH[what].format(value))
        spreads = {"rewards": self.rewards, "gaps": self.gaps, **self.audit.ratings}
        for title, found in spreads.items():
            if "histogram" not in found:
                continue
            if found["min"] == found["max"]:
                lines.append(f"{title}: all {found['min']:g}")
            else:
                lines.append("{}: {min:g} to {max:g}, median {median:g}".format(title, **found))
                lines += _bars(found["histogram"])
        return lines


_LENGTH = {
    "chosen_longer": "the chosen response is longer in {:.0%} of the pairs",
    "rating_correlation": "correlation of length and mean rating: {:+.2f}",
    "reward_correlation": "correlation of length and reward among responses to one prompt: {:+.2f}",
}


def audit_file(
    source: SourceSpec,
    *,
    against: Path | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    max_length: int | None = None,
    truncation: Truncation = "drop",
) -> Findings:
    """Audit one file or data set.

    Args:
        against: held-out rows, whose prompts should not occur in the data set.
        tokenizer: directory or hub name; if given, rows are rendered and tokenized as in training.
        max_length: limit of prompt + response, in tokens; None: no limit.
        truncation: how longer rows are handled, as in a stage.

    Raises:
        DataError: the source is missing, damaged, or of unknown format.
        ModelError: the tokenizer cannot be used.
        RecipeError: `--kwargs` that the chat template does not read.
    """
    found, rows = _read(source)
    audit = found.audit
    audit.observe_prompts(rows)
    if found.kind == "pair":
        _look_at_pairs(found, rows)
    elif found.kind == "rating":
        _look_at_ratings(found, rows)
    if against is not None:
        other, held_out = _read(SourceSpec.model_validate({"path": str(against)}))
        if other.faults:
            raise DataError(
                other.faults[0],
                code="data.unreadable-held-out",
                where=str(against),
                why="common prompts can be found only if both files can be read completely",
                fix=f"fix the file; `rpo-trainer audit {against}` shows all errors in it",
            )
        audit.check_overlap(rows, held_out)
    if tokenizer is not None and rows:
        _tokenize(found, rows, source, tokenizer, chat_template, max_length, truncation)
    else:
        for row in rows:
            _look_at_texts(row, audit)
    return found


def _read(source: SourceSpec) -> tuple[Findings, list[Row]]:
    raw = load_source(source, None, 0)
    present = {column for row in raw.rows for column in row} | set(source.columns or ())
    kind = kind_of(present) if source.format is None else _kind_of_format(source.format)
    if kind is None:
        kind = "pair"
        find_format(
            present, kind, source.format, raw.where
        )  # raises the error that lists the known formats
    found = Findings(raw.name, kind, Audit())
    found.audit.add_read(raw.name, len(raw.rows))
    try:
        return found, _adapt(raw, source, kind, found.audit)
    except (DataError, Problems) as error:
        found.faults += _reasons(error)
    audit = Audit()
    audit.add_read(raw.name, len(raw.rows))
    found.audit = audit
    rows: list[Row] = []
    for row, place in zip(raw.rows, raw.places, strict=True):  # one by one, to keep the valid ones
        try:
            rows += _adapt(replace(raw, rows=[row], places=[place]), source, kind, audit)
        except (DataError, Problems):
            audit.drop("unreadable", f"{raw.name}:{place}")
    return found, rows


def _kind_of_format(name: str) -> Kind | None:
    return FORMATS[name].kind if name in FORMATS else None


def _adapt(raw: RawSource, source: SourceSpec, kind: Kind, audit: Audit) -> list[Row]:
    columns = source.columns
    return adapt(
        raw, kind=kind, format=source.format, columns=columns, unscored=True,
        source_kwargs=source.chat_template_kwargs, audit=audit,
    )  # fmt: skip


def _reasons(error: RPOTrainerError) -> list[str]:
    found = error.problems if isinstance(error, Problems) else [error]
    return [problem.what for problem in found]


def _look_at_pairs(found: Findings, rows: Sequence[Row]) -> None:
    found.audit.observe_pairs(rows)
    scored = [row for row in rows if row["rewards"]]
    found.rewards = _spread([reward for row in scored for reward in row["rewards"]])
    found.gaps = _spread([row["rewards"][0] - row["rewards"][-1] for row in scored])
    lengths = [[len(text) for text in row["responses"]] for row in rows]
    unequal = [own for own in lengths if own[0] != own[-1]]
    longer = sum(own[0] > own[-1] for own in unequal) / len(unequal) if unequal else None
    found.length = {"chosen_longer": longer, "reward_correlation": _correlation(scored)}


def _look_at_ratings(found: Findings, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(name for row in rows for name in row["attributes"]):
        values = [r for row in rows if (r := row["attributes"].get(name)) is not None]
        found.audit.ratings[name] = {"rated": len(values), **_spread(values)}
    lengths, means = [], []
    for row in rows:
        if own := [rating for rating in row["attributes"].values() if rating is not None]:
            lengths.append(float(len(row["responses"][0])))
            means.append(sum(own) / len(own))
    varied = len({*lengths}) > 1 and len({*means}) > 1
    correlation = float(np.corrcoef(lengths, means)[0, 1]) if varied else None
    found.length = {"rating_correlation": correlation}


def _correlation(rows: Sequence[Row]) -> float | None:
    """Return the correlation of length and reward, both centered on the mean of their row."""
    lengths: list[float] = []
    rewards: list[float] = []
    for row in rows:
        own = [float(len(text)) for text in row["responses"]]
        lengths += [length - sum(own) / len(own) for length in own]
        rewards += [reward - sum(row["rewards"]) / len(own) for reward in row["rewards"]]
    if not np.any(lengths) or not np.any(rewards):
        return None
    return float(np.corrcoef(lengths, rewards)[0, 1])


def _spread(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {}
    counts, edges = np.histogram(values, bins=BINS)
    bins = zip(edges[:-1], edges[1:], counts, strict=True)
    histogram = [[float(low), float(high), int(count)] for low, high, count in bins]
    return {**quantiles(sorted(values)), "histogram": histogram}


def _bars(histogram: Sequence[Sequence[float]]) -> list[str]:
    widest = max(count for _, _, count in histogram)
    return [
        f"  {low:>9.3g} to {high:<9.3g} {count:>7} {'█' * round(_BAR * count / max(widest, 1))}"
        for low, high, count in histogram
    ]


def _look_at_texts(row: Row, audit: Audit) -> None:
    """Count responses that tokenization would drop with any tokenizer."""
    if "messages" in row:
        turns = [m for m in row["messages"] if m["role"] == "assistant"]
        texts = [m["content"] for m in turns if not m.get("tool_calls")]
    else:
        texts = row["responses"] if "responses" in row else [row["response"]]
    if any(map(is_blank, texts)):
        audit.warn("blank_response", row["id"])
    if "responses" in row and len(texts) > 1 and len(set(texts)) < len(texts):
        audit.warn("equal_responses", row["id"])


def _tokenize(
    found: Findings,
    rows: list[Row],
    source: SourceSpec,
    name: str,
    chat_template: str | None,
    max_length: int | None,
    truncation: Truncation,
) -> None:
    from rpo_trainer.data.template_variables import check_kwargs
    from rpo_trainer.data.tokenize import tokenize_rows
    from rpo_trainer.models.loading import load_tokenizer
    from rpo_trainer.recipe import ModelSpec

    if found.kind == "rating":
        rows = [{**row, "attributes": [*row["attributes"].values()]} for row in rows]
    tokenizer = load_tokenizer(
        ModelSpec.model_validate({"name_or_path": name, "chat_template": chat_template}), Path()
    )
    check_kwargs(source.chat_template_kwargs, tokenizer, "--kwargs")
    try:
        tokenize_rows(
            rows,
            tokenizer,
            kind="sft" if found.kind == "sft" else "rating" if found.kind == "rating" else "pair",
            max_length=max_length or UNLIMITED,
            truncation=truncation,
            audit=found.audit,
        )
    except (DataError, Problems) as error:
        found.faults += _reasons(error)
