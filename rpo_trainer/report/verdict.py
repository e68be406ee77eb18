"""Verdict of a run: whether each stage reached its goal, and what to change if it did not."""

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
    overall_change,
)
from rpo_trainer.report.formatting import short

# If more than this fraction of the sampled responses is truncated, their rewards are unreliable.
MANY_TRUNCATED = 0.05
# A target gap whose sigmoid is beyond this bound carries no more information than a label.
SATURATED = 0.99
# An RPO stage should end between these fractions of its target gap.
GAP_SHORT, GAP_OVERSHOOTS = 0.5, 1.5


@dataclass(frozen=True)
class Verdict:
    """The headline of the page, and the findings of all stages in order."""

    level: Level
    headline: str
    findings: list[Finding]

    def of_stage(self, name: str) -> list[Finding]:
        """Return the findings about one stage."""
        return [finding for finding in self.findings if finding.stage == name]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that need attention."""
        return [finding for finding in self.findings if finding.level in ("warn", "bad")]

    def grouped_warnings(self) -> list[Finding]:
        """Return the warnings; one that several stages share is listed once, with all stage names."""
        stages: dict[Finding, list[str]] = {}
        for finding in self.warnings:
            stages.setdefault(replace(finding, stage=""), []).append(finding.stage)
        return [replace(shared, stage=", ".join(names)) for shared, names in stages.items()]


def judge(run: RunResults) -> Verdict:
    """Return the headline and all findings of a run."""
    findings = [finding for stage in run.stages for finding in judge_stage(run, stage)]
    levels = {finding.level for finding in findings}
    level: Level = "bad" if "bad" in levels else "warn" if "warn" in levels else "good"
    if level == "good" and not run.finished:
        level = "info"
    return Verdict(level, _headline(run), findings)


def judge_stage(run: RunResults, stage: StageResults) -> list[Finding]:
    """Return the findings of one stage; its state comes first."""
    return list(_judge_stage(run, stage))


def _judge_stage(run: RunResults, stage: StageResults) -> Iterator[Finding]:
    if stage.record.state == "pending":
        yield Finding(stage.name, "not-started", "info", "Not started.")
        return
    if stage.record.state != "done":
        step = stage.metrics[-1].get("step") if stage.metrics else None
        reached = f"; last logged step: {step}" if step is not None else ""
        of = f" of {stage.record.steps}" if step is not None and stage.record.steps else ""
        text = f"Not finished{reached}{of}. The findings below are preliminary."
        yield Finding(stage.name, "not-finished", "info", text)
    bad_step = stage.non_finite_step()
    if bad_step is not None:
        yield Finding(
            stage.name,
            "loss-not-finite",
            "bad",
            f"The loss was not finite at step {bad_step}.",
            "Lower the learning rate or max_grad_norm, and inspect the rows of that step.",
        )
    if stage.is_preference:
        yield from _step_zero(stage)
        yield from judge_outcome(run, stage)
        yield from _gap(stage)
        yield from judge_likelihood(stage)
        yield from _saturation(stage)
        yield from _truncated_responses(stage)
        yield from _early_warnings(stage)
    elif stage.kind == "reward":
        yield from _reward_model(stage)
    else:
        yield from _nll(stage)
    yield from _data(stage)
    yield from _hub(stage)


def _nll(stage: StageResults) -> Iterator[Finding]:
    """Judge an SFT stage: its loss should decrease, preferably on held-out data."""
    held_out = stage.curve("eval_loss")
    before, after, where = None, None, "Held-out NLL"
    if len(held_out.values) >= 2:
        before, after = held_out.values[0], held_out.values[-1]
    elif len(stage.curve("loss").values) >= 2:
        before, after = stage.curve("loss").start(), stage.curve("loss").end()
        where = "Training loss (no held-out NLL was measured)"
    if before is None or after is None:
        yield Finding(
            stage.name,
            "nll-unknown",
            "info",
            "Not enough was logged to tell whether the loss decreased.",
        )
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
            "Raise the learning rate or train more steps. If the loss rose from the start, lower it.",
        )
    yield from _overfitting(stage, held_out, "NLL")


def _reward_model(stage: StageResults) -> Iterator[Finding]:
    """Judge a reward model: it should rank held-out responses better than chance."""
    accuracy, correlation = stage.agreement.accuracy, stage.agreement.correlation()
    if accuracy is None and correlation is None:
        yield Finding(
            stage.name,
            "agreement-unknown",
            "info",
            "The accuracy of the reward model is unknown, because there is no held-out data.",
            "Set `data.eval`, or hold out prompts with `data.eval_fraction`.",
        )
        return
    if accuracy is not None:
        better = (accuracy.value if accuracy.low is None else accuracy.low) > 0.5
        yield Finding(
            stage.name,
            "reward-accuracy",
            "good" if better else "bad",
            f"Held-out pair accuracy: {short(100 * accuracy.value, 1)}%"
            + ("." if better else ", which is not better than chance."),
            None if better else "Use more data, more steps or another learning rate.",
        )
    if correlation is not None:
        named = ", ".join(f"{n} {short(v)}" for n, v in stage.agreement.correlations.items())
        yield Finding(
            stage.name,
            "reward-correlation",
            "info" if correlation > 0 else "bad",
            f"Pearson correlation with held-out ratings: {named}.",
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
            f"Held-out {what} was lowest at step {step} ({short(lowest, 3)}) and rose afterwards.",
            "Train for fewer epochs or on more data.",
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
            f"Step-0 check passed ({numbers}): the policy starts equal to the reference model.",
        )
    else:
        yield Finding(
            stage.name,
            "step0-failed",
            "bad",
            f"Step-0 check failed ({numbers}): policy and reference model differ before the first update.",
            "Check for a wrong reference model, stale reference log-probs, active dropout, or a "
            "different chat template.",
        )


def _gap(stage: StageResults) -> Iterator[Finding]:
    """Compare the implicit reward gap at the end of training with the target gap, if there is one."""
    margins = stage.curve("rewards/margins")
    if not margins:
        return
    reached, target = margins.end(), stage.curve("rewards/target_gap")
    if stage.kind == "rpo" and target and target.end() > 0 and reached > 0:
        yield _against_target(stage, reached, target.end())
        return
    accuracy = stage.curve("rewards/accuracies")
    text = f"The implicit reward gap ended at {short(reached)}"
    if stage.kind == "rpo" and target:
        text += f"; the target gap is {short(target.end())}"
    elif accuracy:
        text += f", with a pair accuracy of {accuracy.end():.0%} on the training rows"
    if reached > 0:
        yield Finding(stage.name, "gap", "good", f"{text}.")
    else:
        yield Finding(
            stage.name,
            "gap",
            "bad",
            f"{text}. The policy did not learn the preferences.",
            "Check that chosen and rejected are not swapped, then raise the learning rate.",
        )


def _against_target(stage: StageResults, reached: float, target: float) -> Finding:
    """Report the fraction of the target gap that an RPO stage reached."""
    fraction, beta = reached / target, stage.setting("beta")
    text = (
        f"The implicit reward gap reached {_percent(fraction)} of the target gap "
        f"({short(reached)} of {short(target)}"
    )
    if beta and beta != 1:
        text += f"; as a log-ratio gap, {short(reached / beta)} of {short(target / beta)} nats"
    text += ")."
    if fraction > GAP_OVERSHOOTS:
        return Finding(
            stage.name,
            "gap-overshoots",
            "warn",
            f"{text} The policy overshoots.",
            "Raise β or lower the learning rate.",
        )
    if fraction >= GAP_SHORT:
        return Finding(stage.name, "gap", "good", text)
    return Finding(
        stage.name,
        "gap-short",
        # The gap of a stage that is still training is expected to grow.
        "warn" if stage.record.state == "done" else "info",
        text,
        _short_advice(stage),
    )


def _short_advice(stage: StageResults) -> str:
    """Return advice that moves an RPO stage closer to its target, with its current values."""

    def now(name: str) -> str:
        value = stage.setting(name)
        return "" if value is None else f" (now {value:g})"

    return (
        f"Raise learning_rate{now('learning_rate')} or num_train_epochs{now('num_train_epochs')}, or "
        f"lower the log-ratio gap that the target requires: raise beta{now('beta')} or lower "
        f"reward_scale{now('reward_scale')}."
    )


def _percent(fraction: float) -> str:
    """Format a fraction as a percentage; small ones keep one decimal."""
    return f"{100 * fraction:.0f}%" if fraction >= 0.01 else f"{100 * fraction:.1f}%"


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
            "the examples: for these, the target carries no more information than a label.",
            "Lower η (`reward_scale`), so that small and large reward gaps differ.",
        )


def _truncated_responses(stage: StageResults) -> Iterator[Finding]:
    share = stage.scores.unfinished
    if share is not None and share > MANY_TRUNCATED:
        yield Finding(
            stage.name,
            "responses-truncated",
            "warn",
            f"{share:.0%} of the sampled responses were truncated at max_new_tokens.",
            "Raise max_new_tokens, and check whether responses grow longer from stage to stage.",
        )


def _early_warnings(stage: StageResults) -> Iterator[Finding]:
    """Report the early warnings that were logged during training."""
    for early in stage.record.warnings or ():
        when = "In training" if early.step is None else f"In training, step {early.step}"
        advice = f"Try: {early.advice}." if early.advice else None
        key = f"warned-{early.name or 'in-training'}"
        yield Finding(stage.name, key, "warn", f"{when}: {early.text}.", advice)


def _data(stage: StageResults) -> Iterator[Finding]:
    """Report what the audit of the training data found."""
    audit = read_audit(stage.record.data.audit) if stage.record.data is not None else AuditView()
    for concern in audit.concerns("the rows", sampled=stage.samples_data):
        level: Level = "info" if concern.minor else "warn"
        yield Finding(stage.name, f"data-{concern.key}", level, f"{concern.text}.", concern.advice)


def _hub(stage: StageResults) -> Iterator[Finding]:
    """Whether the output was pushed to the hub."""
    hub = stage.record.hub
    if hub is not None and hub.error:
        yield Finding(
            stage.name,
            "hub-failed",
            "warn",
            f"Pushing the output to {hub.repo} failed: {hub.error}.",
            f"The output is complete. To upload it: hf upload {hub.repo} {stage.name}/final",
        )
    elif hub is not None:
        yield Finding(stage.name, "hub-pushed", "info", f"Pushed to the hub: {hub.repo}.")


def _headline(run: RunResults) -> str:
    done = sum(stage.record.state == "done" for stage in run.stages)
    if not run.stages:
        return "No stage has run yet."
    plural = "s" if len(run.stages) > 1 else ""
    text = (
        f"The chain finished: {done} stage{plural}."
        if run.finished
        else f"The chain is not finished: {done} of {len(run.stages)} stage{plural} done."
    )
    return text + overall_change(run)
