"""Audit of a data set: rows read and kept, rows dropped and warnings by reason, lengths.

Every dropped row is counted here and reported, with up to three row ids for each reason.
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
    unread_columns,
)
from rpo_trainer.data.duplicates import repeated, shared
from rpo_trainer.data.judge_bias import bias_lines
from rpo_trainer.data.rows import Row
from rpo_trainer.errors import DataError

LONGER = 1.5  # mean length of chosen / rejected above which training mostly learns length
SATURATED = 0.999  # σ(target gap) above which a target is practically a label
FLAT = 0.55  # σ(target gap) below which a target carries almost no information


class Audit(AuditCounts):
    """The counts of one data set, and the messages about them."""

    def leave_out_all(self, reason: str, rows: Sequence[Row], kept: Sequence[Row]) -> None:
        """Count the rows that are not in `kept`, and count repeated prompts again, in `kept` only."""
        kept_ids = {id(row) for row in kept}
        for row in rows:
            if id(row) not in kept_ids:
                self.leave_out(reason, str(row.get("source")), 1)
        if [self.warnings.pop(name) for name in REPEATED if name in self.warnings]:
            self.observe_prompts(kept)

    def observe_prompts(self, rows: Sequence[Row]) -> None:
        """Count prompts that are equal or nearly equal to an earlier one."""
        exact, similar = repeated(rows)
        for row in exact:
            self.warn("duplicate_prompt", row["id"])
        for row in similar:
            self.warn("similar_prompt", row["id"])

    def observe_pairs(self, rows: Sequence[Row]) -> None:
        """Count ties and reversed pairs, and compare the lengths of best and worst response in characters."""
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
                f"chosen responses are much longer than rejected ones "
                f"({best:.0f} and {worst:.0f} characters on average): the model may learn to prefer length"
            )
        if len(gaps) > 1 and gaps[0] == gaps[-1]:
            self.remark(f"all reward gaps are equal ({gaps[0]:g})")

    def observe_ratings(
        self, names: Sequence[str], ratings: Sequence[Sequence[float | None]]
    ) -> None:
        """Count the ratings of each attribute, with quantiles."""
        for number, name in enumerate(names):
            found = sorted(value for row in ratings if (value := row[number]) is not None)
            self.ratings[name] = {"rated": len(found), **quantiles(found)}

    def check_target_gaps(self, rows: Sequence[Row], reward_scale: float) -> None:
        """Warn if the targets σ(η · reward gap) of most rows are near 0 or 1, or near ½ (η = `reward_scale`).

        All rows are checked together; if they pass, each source separately, since sources whose rewards have
        different units have no common η.
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
        """Whether most of these target gaps are saturated or flat; if so, a remark is added."""
        limit = math.log(SATURATED / (1 - SATURATED))
        wide = sum(abs(gap) > limit for gap in gaps)
        if 2 * wide > len(gaps):
            self.remark(
                f"{where}the target gap is so large that its sigmoid is 0 or 1 in {wide} of "
                f"{len(gaps)} rows, where RPO is equivalent to DPO: use a smaller reward_scale"
            )
        limit = math.log(FLAT / (1 - FLAT))
        flat = sum(abs(gap) < limit for gap in gaps)
        if 2 * flat > len(gaps):
            self.remark(
                f"{where}the target gap is so small that its sigmoid is within {FLAT - 0.5:g} of 1/2 in "
                f"{flat} of {len(gaps)} rows, which carry almost no signal: use a larger reward_scale"
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
        """Warn about prompts that are in both, and return the number of such rows of `evaluation`.

        Args:
            on_overlap: whether such prompts are a warning or an error.
            where: the field that names the evaluation data, if not `data.eval`; `overlap` is the sum of all.

        Raises:
            DataError: such prompts exist, and `on_overlap` is `error`.
        """
        exact, similar = shared(train, evaluation)
        overlapping = [*exact, *similar]
        counts = {"rows": len(evaluation), "exact": len(exact), "normalized": len(similar)}
        self.overlap = {name: self.overlap.get(name, 0) + n for name, n in counts.items()}
        if not overlapping:
            return 0
        nearly = f", {len(similar)} of them up to case, white space or Unicode form"
        what = (
            f"{len(overlapping)} of {len(evaluation)} eval rows have a prompt of the training data"
            f"{nearly if similar else ''} ({', '.join(str(row['id']) for row in overlapping[:EXAMPLES])})"
        )
        if on_overlap == "error":
            raise DataError(
                what,
                code="data.eval-overlap",
                where=where or "data.eval",
                why="`eval_overlap: error` does not allow this: metrics on these rows are too optimistic",
                fix="remove these rows from `train` or `eval`, or set `eval_overlap: warn`",
            )
        self.remark(what if where is None else f"{where}: {what}")
        return len(overlapping)

    def drops(self, what: str = "the rows") -> str | None:
        """Return one sentence with the number of dropped rows by reason; None if none was dropped."""
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
        """Return all messages, one fact each, with their `logging` levels.

        Rows that are dropped, truncated or not used, and columns that are not read, are warnings, with their
        fraction of the rows.
        """
        info, warn = logging.INFO, logging.WARNING
        lines = [(info, line) for line in self._counts()]
        if drops := self.drops(what):
            lines.append((warn, drops))
        for reason, counts in self.left_out.items():
            for source, rows in counts.items():
                limited = reason == MAX_ROWS
                total = self.read.get(source, 0) if limited else self._available(source)
                text = f"{percent(rows, max(rows, total))} of its rows ({rows}) {LEFT_OUT[reason]}"
                lines.append((info if reason == HELD_OUT else warn, f"{source}: {text}"))
        lines += [(info, line) for line in self._facts()]
        for reason, count in self.warnings.items():
            total = count.of or self.rows()
            share = f" ({percent(count.count, total)})" if total else ""
            counted = f"{count.count} {rows_word(count)}{share}"
            text = f"{counted}, {WARNINGS.get(reason, reason)}{examples_of(count)}"
            lines.append((info if reason in HARMLESS else warn, text))
        for source, differences in self.generation.items():
            if (difference := differences.text()) is not None:
                lines.append((warn, f"{source}: {difference}"))
        for source, truncated in self.cut.items():
            if truncated.count:
                lines.append((warn if truncated.many else info, f"{source}: {truncated.text()}"))
        lines += [(warn, text) for text in self.remarks]
        for source, columns in self.unread_columns.items():
            lines.append((warn, unread_columns(source, columns)))
        for source, columns in self.extra_columns.items():
            others = [c for c in columns if c not in self.unread_columns.get(source, ())]
            if others:
                lines.append((info, f"{source}: unused columns: {', '.join(others)}"))
        return lines

    def summary_lines(self) -> list[str]:
        """Return the messages as lines; warnings begin with `warning: `."""
        return [
            f"warning: {text}" if level >= logging.WARNING else text
            for level, text in self.messages()
        ]

    def log(self, logger: logging.Logger, what: str, label: str = "") -> None:
        """Log the audit in at most two lines: a summary at INFO, and all warnings at WARNING.

        The other messages are logged at DEBUG, one line each.

        Args:
            what: name of the rows in the warnings ("train_dataset").
            label: prefix of each line.
        """
        messages = self.messages(what)
        if summary := self.summary():
            logger.info("%s%s", label, summary)
        if warnings := [text for level, text in messages if level >= logging.WARNING]:
            logger.warning("%s%s", label, "; ".join(warnings))
        for level, text in messages:
            if level < logging.WARNING:
                logger.debug("%s%s", label, text)

    def summary(self) -> str:
        """Return one line: rows read and kept, filter, calibration, judge, and lengths in tokens."""
        parts = []
        if self.read:
            total = sum(self.read.values())
            several = ", ".join(f"{source} {rows:,}" for source, rows in self.read.items())
            names = f" ({several})" if len(self.read) > 1 else f" from {next(iter(self.read))}"
            kept = f", {sum(self.kept.values()):,} kept" if self.kept else ""
            held = sum(self.left_out.get(HELD_OUT, {}).values())
            set_aside = f", {held:,} held out (eval_fraction)" if held else ""
            parts.append(f"{total:,} rows read{names}{kept}{set_aside}")
        if self.replay:
            parts.append("{rows:,} rows of stage {stage} replayed".format(**self.replay))
        parts += self._settings()
        for name, q in self.lengths().items():
            if name != TOO_LONG:
                parts.append(f"{name} tokens: median {q['median']:g}, max {q['max']:g}")
        return "; ".join(parts)

    def _counts(self) -> list[str]:
        lines = []
        for source, n in self.read.items():
            joined = f", joined by prompt to {self.joined[source]}" if source in self.joined else ""
            kept = f", {self.kept[source]} kept" if source in self.kept else ""
            lines.append(f"{source}: {n} rows read{joined}{kept}")
        if self.replay:
            lines.append(
                "replay of stage {stage}: {rows} of {available} rows".format(**self.replay)
            )
        return lines

    def _settings(self) -> list[str]:
        """Return the results of the filter, the calibration and the judge."""
        lines = [filtered(self.filter)] if self.filter else []
        if self.calibration:
            how = {
                "labels": "maximum likelihood to {pairs} labels, {against} of which contradict the rewards"
            }
            text = how.get(self.calibration["method"], "the median of {pairs} reward gaps")
            lines.append(
                f"reward_scale (η): {self.calibration['reward_scale']:g}, fitted by "
                + text.format(**self.calibration)
            )
        if self.judge:
            lines += bias_lines(self.judge)
        return lines

    def _facts(self) -> list[str]:
        lines = self._settings()
        if self.pairs.get("with_rewards"):
            lines.append("{ties} ties, {reversed} reversed among {rows} rows".format(**self.pairs))
        for name, q in self.ratings.items():
            spread = (
                f", from {q['min']:g} to {q['max']:g}, mean {q['mean']:.2f}" if "min" in q else ""
            )
            lines.append(f"{name}: {q['rated']:g} ratings{spread}")
        for name, q in self.lengths().items():
            what = "tokens of rows longer than max_length" if name == TOO_LONG else f"{name} tokens"
            lines.append(f"{what}: median {q['median']:g}, p95 {q['p95']:g}, longest {q['max']:g}")
        return lines
