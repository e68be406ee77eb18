"""What happened to the data: rows read and kept, drops and warnings by reason, lengths.

Everything that is dropped is counted here, with up to three row ids a reason, and shown.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

from rpo_trainer.data.audit_counts import TOO_LONG, AuditCounts
from rpo_trainer.data.counts import (
    DROPS,
    EXAMPLES,
    HARMLESS,
    HELD_OUT,
    LEFT_OUT,
    MAX_ROWS,
    REPEATED,
    WARNINGS,
    examples_of,
    filtered,
    percent,
    quantiles,
    rows_word,
)
from rpo_trainer.data.duplicates import repeated, shared
from rpo_trainer.data.judge_bias import bias_lines
from rpo_trainer.data.rows import Row
from rpo_trainer.errors import DataError

LONGER = 1.5  # chosen / rejected length, on average, above which a run mostly learns length
SATURATED = 0.999  # σ(target_gap) beyond which a target is as good as a label
FLAT = 0.55  # σ(target_gap) below which a target carries almost no information


class Audit(AuditCounts):
    """The counts of one data set, what they say of it, and both in words."""

    def leave_out_all(self, reason: str, rows: Sequence[Row], kept: Sequence[Row]) -> None:
        """Counts those of `rows` that are not among `kept`; prompts that occur again are those of `kept`."""
        own = {id(row) for row in kept}
        for row in rows:
            if id(row) not in own:
                self.leave_out(reason, str(row.get("source")), 1)
        if [self.warnings.pop(name) for name in REPEATED if name in self.warnings]:
            self.observe_prompts(kept)

    def observe_prompts(self, rows: Sequence[Row]) -> None:
        """Counts prompts that occur again, exactly or nearly."""
        same, alike = repeated(rows)
        for row in same:
            self.warn("duplicate_prompt", row["id"])
        for row in alike:
            self.warn("similar_prompt", row["id"])

    def observe_pairs(self, rows: Sequence[Row]) -> None:
        """Counts ties and reversed pairs; compares the lengths (characters) of best and worst."""
        gaps = sorted(row["rewards"][0] - row["rewards"][-1] for row in rows if row["rewards"])
        best = sum(len(row["responses"][0]) for row in rows) / max(len(rows), 1)
        worst = sum(len(row["responses"][-1]) for row in rows) / max(len(rows), 1)
        self.pairs = {
            "rows": len(rows),
            "with_rewards": len(gaps),
            "ties": sum(gap == 0 for gap in gaps),
            "reversed": sum(gap < 0 for gap in gaps),
            "gap": quantiles(gaps),
            "mean_characters_chosen": best,
            "mean_characters_rejected": worst,
        }
        if best > LONGER * worst:
            self.remark(
                f"chosen is much longer than rejected on average "
                f"({best:.0f} against {worst:.0f} characters): the model may learn length"
            )
        if len(gaps) > 1 and gaps[0] == gaps[-1]:
            self.remark(f"all reward gaps are equal ({gaps[0]:g})")

    def observe_ratings(
        self, names: Sequence[str], ratings: Sequence[Sequence[float | None]]
    ) -> None:
        """How often each attribute is rated, and the quantiles of its ratings."""
        for number, name in enumerate(names):
            found = sorted(value for row in ratings if (value := row[number]) is not None)
            self.ratings[name] = {"rated": len(found), **quantiles(found)}

    def check_target_gaps(self, rows: Sequence[Row], reward_scale: float) -> None:
        """Remarks on targets σ(η · gap) that are 0 or 1, or ½, for most rows (η = `reward_scale`).

        Of all rows; where these are well, of each source: rewards of two units have no common η.
        """
        sources: dict[str, list[float]] = {}
        for row in rows:
            if row["rewards"]:
                gap = reward_scale * (row["rewards"][0] - row["rewards"][-1])
                sources.setdefault(str(row.get("source")), []).append(gap)
        if not self._remark_targets([gap for own in sources.values() for gap in own], ""):
            for source, gaps in sources.items():
                self._remark_targets(gaps, f"{source}: ")

    def _remark_targets(self, gaps: Sequence[float], where: str) -> bool:
        """Whether most of these target gaps are saturated or flat."""
        limit = math.log(SATURATED / (1 - SATURATED))
        wide = sum(abs(gap) > limit for gap in gaps)
        if 2 * wide > len(gaps):
            self.remark(
                f"{where}the target gap is so wide that its sigmoid is 0 or 1 for {wide} of "
                f"{len(gaps)} rows: RPO then learns no more than DPO; a smaller reward_scale keeps "
                f"the gaps"
            )
        limit = math.log(FLAT / (1 - FLAT))
        flat = sum(abs(gap) < limit for gap in gaps)
        if 2 * flat > len(gaps):
            self.remark(
                f"{where}the target gap is so small that its sigmoid is within {FLAT - 0.5:g} of 1/2 "
                f"for {flat} of {len(gaps)} rows: RPO then learns next to nothing; a larger "
                f"reward_scale shows the gaps"
            )
        return 2 * max(wide, flat) > len(gaps)

    def check_overlap(
        self,
        train: Sequence[Row],
        evaluation: Sequence[Row],
        *,
        on_overlap: Literal["warn", "error"] = "warn",
        where: str | None = None,
    ) -> int:
        """Remarks on prompts that are in both; returns how many rows of `evaluation` that is.

        Args:
            on_overlap: what such prompts are.
            where: the field that names the evaluation, if not `data.eval`; several add up in `overlap`.

        Raises:
            DataError: there are some, and `on_overlap` is `error`.
        """
        same, alike = shared(train, evaluation)
        found = [*same, *alike]
        counts = {"rows": len(evaluation), "exact": len(same), "normalised": len(alike)}
        self.overlap = {name: self.overlap.get(name, 0) + n for name, n in counts.items()}
        if not found:
            return 0
        nearly = f", {len(alike)} of them but for case, white space or Unicode form"
        what = (
            f"{len(found)} of {len(evaluation)} eval rows have a prompt that is trained on"
            f"{nearly if alike else ''} ({', '.join(str(row['id']) for row in found[:EXAMPLES])})"
        )
        if on_overlap == "error":
            raise DataError(
                what,
                code="data.eval-overlap",
                where=where or "data.eval",
                why="`eval_overlap: error` allows none, and what is measured would look too good",
                fix="remove these rows from train or eval, or remove `eval_overlap`",
            )
        self.remark(what if where is None else f"{where}: {what}")
        return len(found)

    def drops(self, what: str = "the rows") -> str | None:
        """How much is dropped and why, in one sentence; None where nothing is."""
        dropped = sum(count.count for count in self.dropped.values())
        if not dropped:
            return None
        reasons = "; ".join(
            f"{c.count} {rows_word(c)}, {self._reason(r)}{examples_of(c)}"
            for r, c in sorted(self.dropped.items(), key=lambda item: -item[1].count)
        )
        share = f"{percent(dropped, self.rows())} of " if self.rows() else ""
        of = f"{dropped} of {self.rows()}" if self.rows() else f"{dropped}"
        return f"{share}{what} ({of} rows) dropped: {reasons}"

    def _reason(self, reason: str) -> str:
        limit = self.max_length
        if reason == "too_long" and limit is not None:
            return f"longer than max_length {limit}"
        return DROPS.get(reason, reason)

    def messages(self, what: str = "the rows") -> list[tuple[int, str]]:
        """Everything for people, one fact a line, each with its level of `logging`.

        What is dropped, cut, left out or not read is a warning, with its share of the rows.
        """
        info, warn = logging.INFO, logging.WARNING
        told = [(info, line) for line in self._counts()]
        if drops := self.drops(what):
            told.append((warn, drops))
        for reason, counts in self.left_out.items():
            for source, rows in counts.items():
                limited = reason == MAX_ROWS
                whole = self.read.get(source, 0) if limited else self._available(source)
                text = f"{percent(rows, max(rows, whole))} of its rows ({rows}) {LEFT_OUT[reason]}"
                told.append((info if reason == HELD_OUT else warn, f"{source}: {text}"))
        told += [(info, line) for line in self._facts()]
        for reason, count in self.warnings.items():
            whole = count.of or self.rows()
            share = f" ({percent(count.count, whole)})" if whole else ""
            found = f"{count.count} {rows_word(count)}{share}"
            text = f"{found}, {WARNINGS.get(reason, reason)}{examples_of(count)}"
            told.append((info if reason in HARMLESS else warn, text))
        for source, differences in self.generation.items():
            if (difference := differences.text()) is not None:
                told.append((warn, f"{source}: {difference}"))
        for source, cut in self.cut.items():
            if cut.count:
                told.append((warn if cut.many else info, f"{source}: {cut.text()}"))
        told += [(warn, text) for text in self.remarks]
        for source, columns in self.unread_columns.items():
            told.append((warn, f"{source}: columns that are not read: {', '.join(columns)}"))
        for source, columns in self.extra_columns.items():
            others = [c for c in columns if c not in self.unread_columns.get(source, ())]
            if others:
                told.append((info, f"{source}: unused columns: {', '.join(others)}"))
        return told

    def summary_lines(self) -> list[str]:
        """The same as lines, warnings marked as such."""
        return [
            f"warning: {text}" if level >= logging.WARNING else text
            for level, text in self.messages()
        ]

    def log(self, logger: logging.Logger, what: str, label: str = "") -> None:
        """Logs everything, warnings as such.

        Args:
            what: the rows, as a warning names them ("train_dataset").
            label: goes in front of each line.
        """
        for level, text in self.messages(what):
            logger.log(level, "%s%s", label, text)

    def _counts(self) -> list[str]:
        lines = []
        for source, n in self.read.items():
            joined = f", for {self.joined[source]} prompts" if source in self.joined else ""
            kept = f", {self.kept[source]} kept" if source in self.kept else ""
            lines.append(f"{source}: {n} rows read{joined}{kept}")
        if self.replay:
            lines.append(
                "replay of stage {stage}: {rows} of {available} rows".format(**self.replay)
            )
        return lines

    def _facts(self) -> list[str]:
        lines = [filtered(self.filter)] if self.filter else []
        if self.calibration:
            how = {
                "labels": "the likelihood of {pairs} labels, {against} of them against the rewards"
            }
            text = how.get(self.calibration["method"], "the median of {pairs} gaps")
            lines.append(
                f"reward_scale (η): {self.calibration['reward_scale']:g}, fitted by "
                + text.format(**self.calibration)
            )
        if self.judge:
            lines += bias_lines(self.judge)
        if self.pairs.get("with_rewards"):
            lines.append("{ties} ties, {reversed} reversed among {rows} rows".format(**self.pairs))
        for name, q in self.ratings.items():
            spread = (
                f", from {q['min']:g} to {q['max']:g}, mean {q['mean']:.2f}" if "min" in q else ""
            )
            lines.append(f"{name}: {q['rated']:g} ratings{spread}")
        for name, q in self.lengths().items():
            what = "tokens of rows longer than max_length" if name == TOO_LONG else f"{name} tokens"
            lines.append(f"{what}: median {q['median']:g}, 95 % {q['p95']:g}, longest {q['max']:g}")
        return lines
