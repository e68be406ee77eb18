"""Data audit of a stage: rows that were read, dropped or flagged, and findings about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from rpo_trainer.data.counts import ALIKE, DROPS, MANY_CUT, WARNINGS, percent, unread_columns
from rpo_trainer.stages.record import AuditRecord, PairsRecord, ReasonRecord

# Fractions of the rows above which a finding is a warning.
MANY_DROPPED = 0.25
MANY_TIED = 0.25
MANY_REPEATED = 0.25
MANY_REVERSED = 0.1
MANY_UNREAD = 0.5  # of rows with content that the chat template does not render


@dataclass(frozen=True)
class Concern:
    """A finding about data, its key, and what to change; `minor`: not a warning."""

    key: str
    text: str
    advice: str | None = None
    minor: bool = False


@dataclass(frozen=True)
class Reason:
    """Rows that were dropped or flagged for one reason.

    Attributes:
        text: the reason.
        rows: number of rows.
        examples: ids of the first rows.
        key: stable name of the reason.
        of: number of rows that were examined, if more than the rows that are used.
    """

    text: str
    rows: int
    examples: list[str]
    key: str = ""
    of: int | None = None


@dataclass(frozen=True)
class AuditView:
    """Row counts of a data set; `rows` as in `Audit.rows`. The most frequent reasons come first."""

    rows: int | None = None
    kept: int | None = None
    dropped: list[Reason] = field(default_factory=list)
    noticed: list[Reason] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    pairs: int = 0
    ties: int = 0
    reversed: int = 0
    unread: dict[str, list[str]] = field(default_factory=dict)
    generation: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def concerns(self, what: str, *, sampled: bool = False) -> Iterator[Concern]:
        """Yield the findings about these rows.

        Args:
            what: the name of the rows in a sentence.
            sampled: whether a policy sampled the responses. A confident policy often returns K equal
                responses, so that dropped prompts are expected.
        """
        if self.dropped:
            yield self._dropped(what, sampled)
        total = self.kept or self.rows
        rows = {reason.key: reason.rows for reason in self.noticed}
        if self.pairs and self.ties > MANY_TIED * self.pairs and not self._drops("tie"):
            yield Concern(
                "ties",
                f"{percent(self.ties, self.pairs)} of {what} ({self.ties:,} of {self.pairs:,}) are tied: "
                "chosen and rejected response have the same reward",
                "Drop them with `filter: {ties: drop}`; otherwise DPO trains on an arbitrary order.",
            )
        if self.pairs and self.reversed > MANY_REVERSED * self.pairs:
            yield Concern(
                "reversed",
                f"{percent(self.reversed, self.pairs)} of {what} ({self.reversed:,} of {self.pairs:,}) "
                "are reversed: the chosen response has the lower reward",
                "Check whether chosen and rejected responses are swapped.",
            )
        repeated = rows.get("duplicate_prompt", 0) + rows.get("similar_prompt", 0)
        if self.rows and repeated > MANY_REPEATED * self.rows:
            yield Concern(
                "repeated",
                f"{percent(repeated, self.rows)} of {what} ({repeated:,} of {self.rows:,}) repeat an "
                "earlier prompt",
                "Set `dedup: exact` or `dedup: normalized` to keep only the first row of each prompt.",
            )
        if total and (truncated := rows.get("truncated", 0)) > MANY_CUT * total:
            yield Concern(
                "truncated",
                f"{percent(truncated, total)} of {what} ({truncated:,} of {total:,}) are truncated to "
                "max_length",
                "Raise max_length: a truncated response has no end token.",
            )
        for reason in self.noticed:
            left_out = reason.key not in _COUNTED_ELSEWHERE
            among = reason.of or total
            if among and left_out and reason.rows > MANY_UNREAD * among:
                yield Concern(
                    "noticed",
                    f"{percent(reason.rows, among)} of {what} ({reason.rows:,} rows): {reason.text}",
                )
        for text in self.cut:
            yield Concern(
                "cut",
                text,
                "Raise max_new_tokens: the policy learns where to end only from responses that end.",
            )
        for text in self.generation:
            yield Concern(
                "generation",
                text,
                "Sampling and training should render a prompt the same way: choose another "
                "chat_template, or use rows that this one renders consistently.",
            )
        for remark in self.remarks:
            yield Concern("remark", remark)
        for source, columns in self.unread.items():
            yield Concern(
                "unread-columns",
                unread_columns(source, columns),
                "To use one of them, map it with `columns: {expected name: name in the file}`.",
            )

    def _drops(self, key: str) -> bool:
        return any(reason.key == key for reason in self.dropped)

    def _dropped(self, what: str, sampled: bool) -> Concern:
        fraction, main = self.dropped_fraction(), self.dropped[0]
        alike = sampled and main.key in ALIKE
        many = fraction is not None and fraction > MANY_DROPPED and not alike
        part = f"{percent(self.dropped_rows, self.total)} of {what}" if self.total else what
        return Concern(
            "dropped",
            f"{part} ({self.dropped_rows:,} rows) were dropped; "
            f"most frequent reason: {main.text} ({main.rows:,})",
            "To drop fewer prompts, sample more responses per prompt or raise the temperature."
            if alike
            else None,
            minor=not many,
        )

    @property
    def dropped_rows(self) -> int:
        """All dropped rows."""
        return sum(reason.rows for reason in self.dropped)

    def dropped_fraction(self) -> float | None:
        """Return dropped rows as a fraction of `total`, in [0, 1]; None if unknown."""
        return min(1.0, self.dropped_rows / self.total) if self.total else None

    @property
    def total(self) -> int:
        """All rows, used or dropped; 0 if unknown."""
        return self.rows or (self.dropped_rows + self.kept if self.kept else 0)


# Reasons that `concerns` handles separately, or that do not affect training.
_COUNTED_ELSEWHERE = {
    "truncated", "duplicate_prompt", "similar_prompt", "unusable_rewards", "truth_not_chosen",
    "special_token_text", "equal_responses", "duplicate_responses_removed",
}  # fmt: skip


def read_audit(record: AuditRecord) -> AuditView:
    """Return the counts of an audit, with the text of each reason."""
    pairs, dropped = record.pairs or PairsRecord(), _reasons(record.dropped, DROPS)
    if record.max_length is not None:
        dropped = [
            replace(reason, text=f"{reason.text} {record.max_length}")
            if reason.key == "too_long"
            else reason
            for reason in dropped
        ]
    return AuditView(
        rows=_total(record.read) if record.rows is None else record.rows,
        kept=_total(record.kept),
        dropped=dropped,
        noticed=_reasons(record.warnings, WARNINGS),
        remarks=record.remarks,
        pairs=pairs.with_rewards,
        ties=pairs.ties,
        reversed=pairs.reversed,
        unread=record.unread_columns,
        generation=[
            f"{source}: {found.text}"
            for source, found in record.generation.items()
            if found.of and found.count > MANY_UNREAD * found.of and found.text
        ],
        cut=[f"{source}: {found.text()}" for source, found in record.cut.items() if found.many],
    )


def _total(by_source: Mapping[str, int]) -> int | None:
    return sum(by_source.values()) if by_source else None


def _reasons(records: Mapping[str, ReasonRecord], words: Mapping[str, str]) -> list[Reason]:
    """Sort the reasons by count; `words` has their texts, an unknown reason is shown as its key."""
    found = [
        Reason(
            words.get(key, key if " " in key else key.replace("_", " ")),
            record.count, record.examples, key, record.of,
        )
        for key, record in records.items()
        if record.count
    ]  # fmt: skip
    return sorted(found, key=lambda reason: -reason.rows)
