"""Counts of an audit: rows read and kept, rows dropped and warnings by reason, lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rpo_trainer.data.counts import (
    MAX_ROWS,
    Count,
    Differences,
    SpecialText,
    TruncatedResponses,
    quantiles,
)

TOO_LONG = "too long"  # key of the lengths of rows that max_length drops


class AuditCounts:
    """Counts of one data set (training or evaluation data of one stage).

    Attributes:
        joined: number of prompts of a source whose rows are joined by prompt.
        left_out: rows that are neither used nor dropped, by reason and source.
        extra_columns: all columns that are not read.
        unread_columns: those of `extra_columns` that would change what is trained.
        known_lengths: quantiles of lengths, where the lengths themselves are no longer known.
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
        self.cut: dict[str, TruncatedResponses] = {}
        self.max_length: int | None = None
        self.pairs: dict[str, Any] = {}
        self.filter: dict[str, Any] = {}
        self.calibration: dict[str, Any] = {}
        self.judge: dict[str, Any] = {}
        self.replay: dict[str, Any] = {}
        self.ratings: dict[str, dict[str, Any]] = {}
        self.overlap: dict[str, int] = {}
        self.known_lengths: dict[str, dict[str, float]] = {}
        self._lengths: dict[str, list[int]] = {}

    def adopt(self, other: AuditCounts) -> None:
        """Take the counts of another audit of the same rows."""
        self.__dict__.update(other.__dict__)

    def add_read(self, source: str, rows: int) -> None:
        self.read[source] = self.read.get(source, 0) + rows

    def keep(self, source: str) -> None:
        self.kept[source] = self.kept.get(source, 0) + 1

    def leave_out(self, reason: str, source: str, rows: int) -> None:
        """Count rows that a setting excludes; `reason` is a key of LEFT_OUT.

        `max_rows` is applied to the file. The other reasons select among rows that have been checked, so the
        warnings counted so far are fractions of more rows than remain.
        """
        if rows:
            for count in self.warnings.values() if reason != MAX_ROWS else ():
                count.of = count.of or self.rows()
            found = self.left_out.setdefault(reason, {})
            found[source] = found.get(source, 0) + rows

    def drop(self, reason: str, row_id: str | None = None) -> None:
        """Count a dropped row; `reason` is a key of DROPS, or a text."""
        self.dropped.setdefault(reason, Count()).add(row_id)

    def warn(self, reason: str, row_id: str | None = None) -> None:
        """Count a row with a warning; `reason` is a key of WARNINGS, or a text."""
        self.warnings.setdefault(reason, Count()).add(row_id)

    def add_unread(self, source: str, missed: Sequence[str], others: Sequence[str]) -> None:
        """Add columns that are not read: those that would change what is trained, and the others."""
        if missed:
            self.unread_columns[source] = sorted({*self.unread_columns.get(source, ()), *missed})
        if missed or others:
            known = self.extra_columns.get(source, ())
            self.extra_columns[source] = sorted({*known, *missed, *others})

    def add_joined(self, source: str, prompts: int) -> None:
        """Add the number of prompts of a source whose rows are joined by prompt."""
        self.joined[source] = self.joined.get(source, 0) + prompts

    def add_special_text(self, source: str, tokens: set[str]) -> None:
        """Count a row that was searched for the text of control tokens."""
        found = SpecialText(1, int(bool(tokens)), tokens)
        self.special_text.setdefault(source, SpecialText()).add(found)

    def add_generation(
        self, source: str, row_id: str | None, differs: tuple[str, str] | None
    ) -> None:
        """Count a row whose prompt was rendered for generation and for training.

        Args:
            differs: both texts around the first difference (generation, training); None if they are equal.
        """
        self.generation.setdefault(source, Differences()).add(row_id, differs)

    def add_truncated(self, source: str, finished: Sequence[bool]) -> None:
        """Count the truncated responses of an example."""
        counts = TruncatedResponses(sum(not flag for flag in finished), len(finished))
        self.cut.setdefault(source, TruncatedResponses()).add(counts)

    def remark(self, text: str) -> None:
        """Add a warning about the entire data set."""
        if text not in self.remarks:
            self.remarks.append(text)

    def add_lengths(self, prompt: int, responses: Iterable[int]) -> None:
        """Add the lengths of one example in tokens."""
        self._lengths.setdefault("prompt", []).append(prompt)
        self._lengths.setdefault("response", []).extend(responses)

    def add_too_long(self, tokens: int) -> None:
        """Add the length of the longest text of a row that max_length drops."""
        self._lengths.setdefault(TOO_LONG, []).append(tokens)

    def add_tokenized(self, other: AuditCounts) -> None:
        """Add the counts of another audit, from tokenizing further rows of the same data set."""
        for source, rows in other.kept.items():
            self.kept[source] = self.kept.get(source, 0) + rows
        for counts, other_counts in (
            (self.dropped, other.dropped),
            (self.warnings, other.warnings),
        ):
            for reason, count in other_counts.items():
                counts.setdefault(reason, Count()).add_all(count)
        for source, found in other.special_text.items():
            self.special_text.setdefault(source, SpecialText()).add(found)
        for source, differences in other.generation.items():
            self.generation.setdefault(source, Differences()).add_all(differences)
        for source, truncated in other.cut.items():
            self.cut.setdefault(source, TruncatedResponses()).add(truncated)
        for name, lengths in other._lengths.items():
            self._lengths.setdefault(name, []).extend(lengths)

    def lengths(self) -> dict[str, dict[str, float]]:
        """Return token counts: {"prompt" | "response" | "too long": {min, median, mean, p95, max}}.

        The first two are of the examples kept, the last of the rows longer than max_length.
        """
        found = {name: quantiles(sorted(values)) for name, values in self._lengths.items()}
        return {**self.known_lengths, **found}

    def as_dict(self) -> dict[str, Any]:
        """Return all counts as JSON-compatible values."""
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
        """Return the number of rows that are used or dropped, the base of percentages.

        These are the rows read, and those of a replay, less those that a setting excludes. Joined rows count
        once. A count with its own base has it in `of`.
        """
        found = sum(map(self._available, self.read)) + int(self.replay.get("rows", 0))
        later = (counts for reason, counts in self.left_out.items() if reason != MAX_ROWS)
        return max(0, found - sum(sum(counts.values()) for counts in later))

    def _available(self, source: str) -> int:
        """Return the rows of a source up to its `max_rows`; joined rows count once."""
        read = self.read.get(source, 0) - self.left_out.get(MAX_ROWS, {}).get(source, 0)
        return self.joined.get(source, read)
