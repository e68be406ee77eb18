"""Plain words: did each stage do its job, and what to change where it did not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rpo_trainer.report.audits import AuditView, read_audit
from rpo_trainer.report.collect import Curve, RunResults, StageResults
from rpo_trainer.report.findings import (
    Finding,
    Level,
    judge_likelihood,
    judge_outcome,
    whole_change,
)
from rpo_trainer.report.formatting import short

# More than this share of sampled responses without an end makes their rewards doubtful.
MANY_CUT = 0.05
# σ(target_gap) beyond these bounds asks for a gap that no finite training reaches.
SATURATED = 0.99


@dataclass(frozen=True)
class Verdict:
    """The first thing a reader sees, then the findings of each stage in order."""

    level: Level
    headline: str
    findings: list[Finding]

    def of_stage(self, name: str) -> list[Finding]:
        """The findings about one stage."""
        return [finding for finding in self.findings if finding.stage == name]

    @property
    def warnings(self) -> list[Finding]:
        """What a reader should look at."""
        return [finding for finding in self.findings if finding.level in ("warn", "bad")]

    def grouped_warnings(self) -> list[Finding]:
        """The same, those that several stages share once, with all their names."""
        stages: dict[Finding, list[str]] = {}
        for finding in self.warnings:
            stages.setdefault(replace(finding, stage=""), []).append(finding.stage)
        return [replace(shared, stage=", ".join(names)) for shared, names in stages.items()]


def judge(run: RunResults) -> Verdict:
    """All findings of a run, and its headline."""
    findings = [finding for stage in run.stages for finding in judge_stage(run, stage)]
    levels = {finding.level for finding in findings}
    level: Level = "bad" if "bad" in levels else "warn" if "warn" in levels else "good"
    if level == "good" and not run.finished:
        level = "info"
    return Verdict(level, _headline(run), findings)


def judge_stage(run: RunResults, stage: StageResults) -> list[Finding]:
    """The findings of one stage, its state first."""
    return list(_judge_stage(run, stage))


def _judge_stage(run: RunResults, stage: StageResults) -> Iterator[Finding]:
    if stage.record.state == "pending":
        yield Finding(stage.name, "not-started", "info", "Has not started.")
        return
    if stage.record.state != "done":
        step = stage.metrics[-1].get("step") if stage.metrics else None
        reached = f"; last logged step: {step}" if step is not None else ""
        of = f" of {stage.record.steps}" if step is not None and stage.record.steps else ""
        text = f"Not finished{reached}{of}. What follows is how it stands."
        yield Finding(stage.name, "not-finished", "info", text)
    bad_step = stage.non_finite_step()
    if bad_step is not None:
        yield Finding(
            stage.name,
            "loss-not-finite",
            "bad",
            f"The loss was not finite at step {bad_step}.",
            "Lower the learning rate or max_grad_norm, and look at the rows of that step.",
        )
    if stage.is_preference:
        yield from _step_zero(stage)
        yield from judge_outcome(run, stage)
        yield from _gap(stage)
        yield from judge_likelihood(stage)
        yield from _saturation(stage)
        yield from _cut_responses(stage)
        yield from _early_warnings(stage)
    elif stage.kind == "reward":
        yield from _reward_model(stage)
    else:
        yield from _nll(stage)
    yield from _data(stage)
    yield from _hub(stage)


def _nll(stage: StageResults) -> Iterator[Finding]:
    """SFT: the negative log-likelihood should have fallen, best seen on held-out rows."""
    held_out = stage.curve("eval_loss")
    before, after, where = None, None, "Held-out NLL"
    if len(held_out.values) >= 2:
        before, after = held_out.values[0], held_out.values[-1]
    elif len(stage.curve("loss").values) >= 2:
        before, after = stage.curve("loss").start(), stage.curve("loss").end()
        where = "Training loss (there is no held-out NLL)"
    if before is None or after is None:
        yield Finding(stage.name, "nll-unknown", "info", "Too little was logged to judge it.")
        return
    if after < before:
        text = f"{where} fell from {short(before, 3)} to {short(after, 3)}."
        yield Finding(stage.name, "nll-fell", "good", text)
    else:
        yield Finding(
            stage.name,
            "nll-did-not-fall",
            "bad",
            f"{where} did not fall: {short(before, 3)} before, {short(after, 3)} after.",
            "Try a higher learning rate or more steps; if it rose at once, a lower one.",
        )
    yield from _overfitting(stage, held_out, "NLL")


def _reward_model(stage: StageResults) -> Iterator[Finding]:
    """A reward model should order held-out responses as the given rewards do, better than chance."""
    accuracy, correlation = stage.agreement.accuracy, stage.agreement.correlation()
    if accuracy is None and correlation is None:
        yield Finding(
            stage.name,
            "agreement-unknown",
            "info",
            "Nothing was held out, so nobody knows how well it scores.",
            "Give `data.eval`, or set some prompts aside with `data.eval_fraction`.",
        )
        return
    if accuracy is not None:
        better = (accuracy.value if accuracy.low is None else accuracy.low) > 0.5
        yield Finding(
            stage.name,
            "reward-accuracy",
            "good" if better else "bad",
            f"Of held-out pairs {short(100 * accuracy.value, 1)} % have the higher reward on the "
            "better response." + ("" if better else " That is no better than chance."),
            None if better else "More data, more steps or another learning rate.",
        )
    if correlation is not None:
        named = ", ".join(f"{n} {short(v)}" for n, v in stage.agreement.correlations.items())
        yield Finding(
            stage.name,
            "reward-correlation",
            "info" if correlation > 0 else "bad",
            f"Correlation with held-out ratings: {named}.",
        )
    yield from _overfitting(stage, stage.curve("eval_loss"), "loss")


def _overfitting(stage: StageResults, held_out: Curve, what: str) -> Iterator[Finding]:
    if len(held_out.values) < 3:
        return
    lowest = min(held_out.values)
    if held_out.values[-1] > lowest * 1.02:
        step = held_out.steps[held_out.values.index(lowest)]
        yield Finding(
            stage.name,
            "overfitting",
            "warn",
            f"Held-out {what} was lowest at step {step} ({short(lowest, 3)}) and rose again.",
            "Train for fewer epochs, or on more data.",
        )


def _step_zero(stage: StageResults) -> Iterator[Finding]:
    check = stage.record.step0
    if check is None or check.ok is None:
        return
    numbers = f"loss {short(check.loss, 4)}, expected {short(check.expected, 4)}"
    if check.ok:
        yield Finding(
            stage.name,
            "step0-passed",
            "good",
            f"Step-0 check passed ({numbers}): the reference is what it starts from.",
        )
    else:
        yield Finding(
            stage.name,
            "step0-failed",
            "bad",
            f"Step-0 check failed ({numbers}): policy and reference differ before any update.",
            "Look for a wrong reference, a stale reference cache, dropout left on, or another "
            "chat template.",
        )


def _gap(stage: StageResults) -> Iterator[Finding]:
    margin, target = stage.curve("rewards/margins"), stage.curve("rewards/target_gap")
    accuracy = stage.curve("rewards/accuracies")
    if not margin:
        return
    reached = margin.end()
    if stage.kind == "rpo" and target:
        aim = target.end()
        share = f" ({reached / aim:.0%} of it)" if aim > 0 else ""
        level: Level = "good" if reached > 0 else "bad"
        text = f"The implicit gap ended at {short(reached)}, the target gap is {short(aim)}{share}."
        if aim > 0 and reached > 1.5 * aim:
            yield Finding(
                stage.name,
                "gap-overshoots",
                "warn",
                text,
                "The policy overshoots: raise β or lower the learning rate.",
            )
            return
    else:
        right = (
            f", and the chosen response won in {accuracy.end():.0%} of the pairs"
            if accuracy
            else ""
        )
        level = "good" if reached > 0 else "bad"
        text = f"The implicit gap ended at {short(reached)}{right}."
    advice = None
    if level == "bad":
        advice = (
            "It did not learn the preferences: check which response is the chosen one, then raise "
            "the learning rate."
        )
    yield Finding(stage.name, "gap", level, text, advice)


def _saturation(stage: StageResults) -> Iterator[Finding]:
    targets = [gap.target_gap for gap in stage.gaps if gap.target_gap is not None]
    if stage.kind != "rpo" or not targets:
        return
    bound = math.log(SATURATED / (1 - SATURATED))
    share = sum(abs(target) > bound for target in targets) / len(targets)
    if share > 0.5:
        yield Finding(
            stage.name,
            "targets-saturated",
            "warn",
            f"σ(target gap) is above {SATURATED} or below {1 - SATURATED:.2f} for {share:.0%} of "
            "the examples: there RPO asks for no more than DPO does.",
            "Lower reward_scale (η), so that rewards tell small gaps from large ones.",
        )


def _cut_responses(stage: StageResults) -> Iterator[Finding]:
    share = stage.scores.unfinished
    if share is not None and share > MANY_CUT:
        yield Finding(
            stage.name,
            "responses-cut",
            "warn",
            f"{share:.0%} of the sampled responses were cut by max_new_tokens before they ended.",
            "Raise max_new_tokens, or look whether responses grow longer stage by stage.",
        )


def _early_warnings(stage: StageResults) -> Iterator[Finding]:
    """What was warned of while the stage trained, as it was then."""
    for early in stage.record.warnings or ():
        when = "In training" if early.step is None else f"In training, at step {early.step}"
        advice = f"To try: {early.advice}." if early.advice else None
        key = f"warned-{early.name or 'in-training'}"
        yield Finding(stage.name, key, "warn", f"{when}: {early.text}.", advice)


def _data(stage: StageResults) -> Iterator[Finding]:
    """What the audit of the training data found."""
    audit = read_audit(stage.record.data.audit) if stage.record.data is not None else AuditView()
    for concern in audit.concerns("the rows", sampled=stage.samples_data):
        level: Level = "info" if concern.minor else "warn"
        yield Finding(stage.name, f"data-{concern.key}", level, f"{concern.text}.", concern.advice)


def _hub(stage: StageResults) -> Iterator[Finding]:
    """Where the output was to be uploaded."""
    hub = stage.record.hub
    if hub is not None and hub.error:
        yield Finding(
            stage.name,
            "hub-failed",
            "warn",
            f"The output is not on the hub ({hub.repo}): {hub.error}.",
            f"It is complete in `{stage.name}/final`: hf upload {hub.repo} {stage.name}/final",
        )
    elif hub is not None:
        yield Finding(stage.name, "hub-pushed", "info", f"The output is on the hub: {hub.repo}.")


def _headline(run: RunResults) -> str:
    done = sum(stage.record.state == "done" for stage in run.stages)
    if not run.stages:
        return "Nothing has run yet."
    plural = "s" if len(run.stages) > 1 else ""
    text = (
        f"The chain finished: {done} stage{plural}."
        if run.finished
        else f"The chain is not finished: {done} of {len(run.stages)} stage{plural} done."
    )
    return text + whole_change(run)
