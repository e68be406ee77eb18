"""The data audit of a stage, read out of chain.json: what was read, dropped and noticed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rpo_trainer.data.counts import ALIKE, DROPS, MANY_CUT, WARNINGS, CutResponses, percent
from rpo_trainer.report.values import count, mapping

# Shares of the rows above which something deserves attention.
MANY_DROPPED = 0.25
MANY_TIED = 0.25
MANY_REPEATED = 0.25
MANY_REVERSED = 0.1
MANY_UNREAD = 0.5  # of what a chat template leaves out of the rows


@dataclass(frozen=True)
class Concern:
    """A finding about data, and what to change; `minor`: reported without a warning."""

    text: str
    advice: str | None = None
    minor: bool = False


@dataclass(frozen=True)
class Reason:
    """Rows that were dropped or noticed for one reason: its text, their number, first ids, short name.

    `of`: among how many rows, where these are more than the rows that are used.
    """

    text: str
    rows: int
    examples: list[str]
    key: str = ""
    of: int | None = None


@dataclass(frozen=True)
class AuditRecord:
    """Row counts of a data set; `rows` as in `Audit.rows`, the most frequent reasons come first."""

    rows: int | None = None
    kept: int | None = None
    dropped: list[Reason] = field(default_factory=list)
    noticed: list[Reason] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    pairs: int | None = None
    ties: int = 0
    reversed: int = 0
    unread: dict[str, list[str]] = field(default_factory=dict)
    generation: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def concerns(self, what: str, *, sampled: bool = False) -> Iterator[Concern]:
        """What a reader should know before, or after, training on these rows.

        Args:
            what: the rows, as a sentence names them.
            sampled: their responses come from a policy. A confident policy gives K equal responses, and
                such prompts are expected among the dropped.
        """
        if self.dropped:
            yield self._dropped(what, sampled)
        whole = self.kept or self.rows
        rows = {reason.key: reason.rows for reason in self.noticed}
        if self.pairs and self.ties > MANY_TIED * self.pairs and not self._drops("tie"):
            yield Concern(
                f"{percent(self.ties, self.pairs)} of {what} ({self.ties:,} of {self.pairs:,}) are tied: "
                "chosen and rejected have the same reward",
                "`filter: {ties: drop}` leaves them out; without it DPO learns an arbitrary order from them.",
            )
        if self.pairs and self.reversed > MANY_REVERSED * self.pairs:
            yield Concern(
                f"{percent(self.reversed, self.pairs)} of {what} ({self.reversed:,} of {self.pairs:,}) "
                "are reversed: chosen has the lower reward",
                "Check whether chosen and rejected are swapped.",
            )
        repeated = rows.get("duplicate_prompt", 0) + rows.get("similar_prompt", 0)
        if self.rows and repeated > MANY_REPEATED * self.rows:
            yield Concern(
                f"{percent(repeated, self.rows)} of {what} ({repeated:,} of {self.rows:,}) have a prompt "
                "that was seen before",
                "`dedup: exact` or `normalised` keeps the first row of each prompt.",
            )
        if whole and (cut := rows.get("truncated", 0)) > MANY_CUT * whole:
            yield Concern(
                f"{percent(cut, whole)} of {what} ({cut:,} of {whole:,}) are cut to max_length",
                "Raise max_length: a cut response has no end.",
            )
        for reason in self.noticed:
            left_out = reason.key not in _COUNTED_ELSEWHERE
            among = reason.of or whole
            if among and left_out and reason.rows > MANY_UNREAD * among:
                yield Concern(
                    f"{percent(reason.rows, among)} of {what} ({reason.rows:,} rows): {reason.text}"
                )
        for text in self.cut:
            yield Concern(
                text,
                "Raise max_new_tokens: where few responses end, little is learned of where to end.",
            )
        for text in self.generation:
            yield Concern(
                text,
                "A model should be sampled after the same text that it is trained after: choose another "
                "chat_template, or use rows that this one renders so.",
            )
        for remark in self.remarks:
            yield Concern(remark)
        for source, columns in self.unread.items():
            yield Concern(
                f"{source}: columns that are not read: {', '.join(columns)}",
                "Name one that is meant with `columns: {ours: theirs}`.",
            )

    def _drops(self, key: str) -> bool:
        return any(reason.key == key for reason in self.dropped)

    def _dropped(self, what: str, sampled: bool) -> Concern:
        share, main = self.dropped_share(), self.dropped[0]
        alike = sampled and main.key in ALIKE
        many = share is not None and share > MANY_DROPPED and not alike
        part = f"{percent(self.dropped_rows, self.total)} of {what}" if self.total else what
        return Concern(
            f"{part} ({self.dropped_rows:,} rows) are dropped; most often: {main.text} ({main.rows:,})",
            "More responses a prompt, or a higher temperature, leave fewer such prompts."
            if alike
            else None,
            minor=not many,
        )

    @property
    def dropped_rows(self) -> int:
        """All dropped rows."""
        return sum(reason.rows for reason in self.dropped)

    def dropped_share(self) -> float | None:
        """Dropped rows as a share of `total`, in [0, 1]; None where that is not known."""
        return min(1.0, self.dropped_rows / self.total) if self.total else None

    @property
    def total(self) -> int:
        """All rows that are used or dropped; 0 where that is not known."""
        return self.rows or (self.dropped_rows + self.kept if self.kept else 0)


# Reasons that `concerns` handles separately, or that do not change what is trained.
_COUNTED_ELSEWHERE = {
    "truncated", "duplicate_prompt", "similar_prompt", "unusable_rewards", "truth_not_chosen",
    "special_token_text", "equal_responses", "duplicate_responses_removed",
}  # fmt: skip


def read_audit(record: Mapping[str, Any]) -> AuditRecord:
    """The counts of `Audit.as_dict()`; whatever is missing stays empty."""
    remarks = record.get("remarks")
    pairs = mapping(record.get("pairs"))
    unread = {
        str(source): [str(column) for column in columns]
        for source, columns in mapping(record.get("unread_columns")).items()
        if isinstance(columns, list)
    }
    dropped = _reasons(record.get("dropped"), DROPS)
    rows, limit = count(record.get("rows")), count(record.get("max_length"))
    if limit is not None:
        dropped = [
            replace(reason, text=f"{reason.text} {limit}") if reason.key == "too_long" else reason
            for reason in dropped
        ]
    return AuditRecord(
        rows=_total(record.get("read")) if rows is None else rows,
        kept=_total(record.get("kept")),
        dropped=dropped,
        noticed=_reasons(record.get("warnings"), WARNINGS),
        remarks=[str(remark) for remark in remarks] if isinstance(remarks, list) else [],
        pairs=count(pairs.get("with_rewards")),
        ties=count(pairs.get("ties")) or 0,
        reversed=count(pairs.get("reversed")) or 0,
        unread=unread,
        generation=list(_different(record.get("generation"))),
        cut=list(_cut(record.get("cut"))),
    )


def _different(record: Any) -> Iterator[str]:
    """The sources of which most rows are trained after another text than generation has."""
    for source, value in mapping(record).items():
        entry = mapping(value)
        rows, whole = count(entry.get("count")), count(entry.get("of"))
        if rows and whole and rows > MANY_UNREAD * whole and entry.get("text"):
            yield f"{source}: {entry['text']}"


def _cut(record: Any) -> Iterator[str]:
    """The sources of which many responses were cut before they ended."""
    for source, value in mapping(record).items():
        entry = mapping(value)
        found = CutResponses(count(entry.get("count")) or 0, count(entry.get("of")) or 0)
        if found.many:
            yield f"{source}: {found.text()}"


def _total(by_source: Any) -> int | None:
    found = [rows for rows in map(count, mapping(by_source).values()) if rows is not None]
    return sum(found) if found else count(by_source)


def _reasons(record: Any, words: Mapping[str, str]) -> list[Reason]:
    """From `{reason: {count, examples}}` or `{reason: count}`; `words` has the texts by reason."""
    found = []
    for key, value in mapping(record).items():
        entry = mapping(value)
        rows = count(entry.get("count")) if entry else count(value)
        examples = entry.get("examples")
        if rows:
            text = words.get(key, key if " " in key else key.replace("_", " "))
            ids = [str(example) for example in examples] if isinstance(examples, list) else []
            found.append(Reason(text, rows, ids, key, count(entry.get("of"))))
    return sorted(found, key=lambda reason: -reason.rows)
