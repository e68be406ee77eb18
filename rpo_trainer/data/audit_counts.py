"""The counts of an audit: rows read and kept, drops and warnings by reason, lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rpo_trainer.data.counts import (
    MAX_ROWS,
    Count,
    CutResponses,
    Differences,
    SpecialText,
    quantiles,
)

TOO_LONG = "too long"  # beside prompt and response: the lengths of what max_length drops


class AuditCounts:
    """The counts of one data set (train or eval of one stage).

    `joined` counts the prompts of a source where several rows of the file made one. `left_out` counts
    rows by reason and source that are neither used nor dropped. `extra_columns` are all columns that
    are not read, `unread_columns` those of them that change what is trained.
    """

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.joined: dict[str, int] = {}
        self.left_out: dict[str, dict[str, int]] = {}
        self.dropped: dict[str, Count] = {}
        self.warnings: dict[str, Count] = {}
        self.remarks: list[str] = []
        self.extra_columns: dict[str, list[str]] = {}
        self.unread_columns: dict[str, list[str]] = {}
        self.special_text: dict[str, SpecialText] = {}
        self.generation: dict[str, Differences] = {}
        self.cut: dict[str, CutResponses] = {}
        self.max_length: int | None = None
        self.pairs: dict[str, Any] = {}
        self.filter: dict[str, Any] = {}
        self.calibration: dict[str, Any] = {}
        self.judge: dict[str, Any] = {}
        self.replay: dict[str, Any] = {}
        self.ratings: dict[str, dict[str, Any]] = {}
        self.overlap: dict[str, int] = {}
        self._lengths: dict[str, list[int]] = {}

    def add_read(self, source: str, rows: int) -> None:
        self.read[source] = self.read.get(source, 0) + rows

    def keep(self, source: str) -> None:
        self.kept[source] = self.kept.get(source, 0) + 1

    def leave_out(self, reason: str, source: str, rows: int) -> None:
        """Counts rows that are not used by request; `reason` is a key of LEFT_OUT.

        `max_rows` is applied to the file. The other reasons choose among rows that were looked at, so
        the warnings up to here are shares of more rows than are left.
        """
        if rows:
            for count in self.warnings.values() if reason != MAX_ROWS else ():
                count.of = count.of or self.rows()
            found = self.left_out.setdefault(reason, {})
            found[source] = found.get(source, 0) + rows

    def drop(self, reason: str, row_id: str | None = None) -> None:
        """Counts a dropped row; `reason` is a key of DROPS, or words of its own."""
        self.dropped.setdefault(reason, Count()).add(row_id)

    def warn(self, reason: str, row_id: str | None = None) -> None:
        """Counts a row with a warning; `reason` is a key of WARNINGS, or words of its own."""
        self.warnings.setdefault(reason, Count()).add(row_id)

    def add_unread(self, source: str, missed: Sequence[str], others: Sequence[str]) -> None:
        """Columns that are not read: those that change what is trained, and the others."""
        if missed:
            self.unread_columns[source] = sorted({*self.unread_columns.get(source, ()), *missed})
        if missed or others:
            known = self.extra_columns.get(source, ())
            self.extra_columns[source] = sorted({*known, *missed, *others})

    def add_joined(self, source: str, prompts: int) -> None:
        """Prompts of a source where several rows of the file make one."""
        self.joined[source] = self.joined.get(source, 0) + prompts

    def add_special_text(self, source: str, tokens: set[str]) -> None:
        """Counts a row that was looked at for the text of control tokens."""
        found = SpecialText(1, int(bool(tokens)), tokens)
        self.special_text.setdefault(source, SpecialText()).add(found)

    def add_generation(
        self, source: str, row_id: str | None, differs: tuple[str, str] | None
    ) -> None:
        """Counts a row by whether generation has the text that it is trained after.

        Args:
            differs: what generation and training have around the first difference; None: the same.
        """
        self.generation.setdefault(source, Differences()).add(row_id, differs)

    def add_cut(self, source: str, finished: Sequence[bool]) -> None:
        """Counts the responses of an example that were cut before they ended."""
        found = CutResponses(sum(not whole for whole in finished), len(finished))
        self.cut.setdefault(source, CutResponses()).add(found)

    def remark(self, text: str) -> None:
        """A warning about the whole data set."""
        if text not in self.remarks:
            self.remarks.append(text)

    def add_lengths(self, prompt: int, responses: Iterable[int]) -> None:
        """Lengths in tokens of one example."""
        self._lengths.setdefault("prompt", []).append(prompt)
        self._lengths.setdefault("response", []).extend(responses)

    def add_too_long(self, tokens: int) -> None:
        """Length of the longest text of a row that max_length drops."""
        self._lengths.setdefault(TOO_LONG, []).append(tokens)

    def add_tokenized(self, other: AuditCounts) -> None:
        """Counts what another audit took of further rows: kept, dropped, warned of, lengths."""
        for source, rows in other.kept.items():
            self.kept[source] = self.kept.get(source, 0) + rows
        for mine, theirs in ((self.dropped, other.dropped), (self.warnings, other.warnings)):
            for reason, count in theirs.items():
                mine.setdefault(reason, Count()).add_all(count)
        for source, found in other.special_text.items():
            self.special_text.setdefault(source, SpecialText()).add(found)
        for source, differences in other.generation.items():
            self.generation.setdefault(source, Differences()).add_all(differences)
        for source, cut in other.cut.items():
            self.cut.setdefault(source, CutResponses()).add(cut)
        for name, lengths in other._lengths.items():
            self._lengths.setdefault(name, []).extend(lengths)

    def lengths(self) -> dict[str, dict[str, float]]:
        """Token counts: {"prompt" | "response" | "too long": {min, median, mean, p95, max}}.

        The first two of the examples kept, the last of the rows longer than max_length.
        """
        return {name: quantiles(sorted(values)) for name, values in self._lengths.items()}

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "read": dict(self.read),
            "joined": dict(self.joined),
            "kept": dict(self.kept),
            "left_out": {reason: dict(counts) for reason, counts in self.left_out.items()},
            "rows": self.rows(),
            "dropped": {reason: count.as_dict() for reason, count in self.dropped.items()},
            "warnings": {reason: count.as_dict() for reason, count in self.warnings.items()},
            "remarks": list(self.remarks),
            "generation": {s: d.as_dict() for s, d in self.generation.items() if d.example},
            "cut": {source: found.as_dict() for source, found in self.cut.items()},
            "extra_columns": dict(self.extra_columns),
            "unread_columns": dict(self.unread_columns),
            "pairs": dict(self.pairs),
            "filter": dict(self.filter),
            "calibration": dict(self.calibration),
            "judge": dict(self.judge),
            "replay": dict(self.replay),
            "ratings": dict(self.ratings),
            "overlap": dict(self.overlap),
            "max_length": self.max_length,
            "lengths": self.lengths(),
        }

    def rows(self) -> int:
        """Rows that are used or dropped: those that were read, and of a replay, without those left out by
        request; rows joined to one count once. Percentages are of these, or of `of` of a count."""
        found = sum(map(self._available, self.read)) + int(self.replay.get("rows", 0))
        later = (counts for reason, counts in self.left_out.items() if reason != MAX_ROWS)
        return max(0, found - sum(sum(counts.values()) for counts in later))

    def _available(self, source: str) -> int:
        """Rows of a source up to its `max_rows`, rows joined to one counted once."""
        read = self.read.get(source, 0) - self.left_out.get(MAX_ROWS, {}).get(source, 0)
        return self.joined.get(source, read)
