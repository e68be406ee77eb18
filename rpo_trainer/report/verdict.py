"""Plain words: did each stage do its job, and what to change where it did not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rpo_trainer.report.collect import Curve, RunRecord, StageRecord
from rpo_trainer.report.findings import Finding, Level
from rpo_trainer.report.likelihood import judge_likelihood
from rpo_trainer.report.outcome import judge_outcome, whole_change
from rpo_trainer.report.values import short

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


def judge(run: RunRecord) -> Verdict:
    """All findings of a run, and its headline."""
    findings = [finding for stage in run.stages for finding in judge_stage(run, stage)]
    levels = {finding.level for finding in findings}
    level: Level = "bad" if "bad" in levels else "warn" if "warn" in levels else "good"
    if level == "good" and not run.finished:
        level = "info"
    return Verdict(level, _headline(run), findings)


def judge_stage(run: RunRecord, stage: StageRecord) -> list[Finding]:
    """The findings of one stage, its state first."""
    return list(_judge_stage(run, stage))


def _judge_stage(run: RunRecord, stage: StageRecord) -> Iterator[Finding]:
    if stage.state == "pending":
        yield Finding(stage.name, "info", "Has not started.")
        return
    if stage.state != "done":
        step = stage.metrics[-1].get("step") if stage.metrics else None
        reached = f"; last logged step: {step}" if step is not None else ""
        of = f" of {stage.steps}" if step is not None and stage.steps else ""
        yield Finding(
            stage.name, "info", f"Not finished{reached}{of}. What follows is how it stands."
        )
    bad_step = stage.non_finite_step()
    if bad_step is not None:
        yield Finding(
            stage.name,
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
        yield from _said(stage)
    elif stage.kind == "reward":
        yield from _reward_model(stage)
    else:
        yield from _nll(stage)
    yield from _data(stage)
    yield from _hub(stage)


def _nll(stage: StageRecord) -> Iterator[Finding]:
    """SFT: the negative log-likelihood should have fallen, best seen on held-out rows."""
    held_out = stage.curve("eval_loss")
    before, after, where = None, None, "Held-out NLL"
    if len(held_out.values) >= 2:
        before, after = held_out.values[0], held_out.values[-1]
    elif len(stage.curve("loss").values) >= 2:
        before, after = stage.curve("loss").start(), stage.curve("loss").end()
        where = "Training loss (there is no held-out NLL)"
    if before is None or after is None:
        yield Finding(stage.name, "info", "Too little was logged to judge it.")
        return
    if after < before:
        yield Finding(
            stage.name, "good", f"{where} fell from {short(before, 3)} to {short(after, 3)}."
        )
    else:
        yield Finding(
            stage.name,
            "bad",
            f"{where} did not fall: {short(before, 3)} before, {short(after, 3)} after.",
            "Try a higher learning rate or more steps; if it rose at once, a lower one.",
        )
    yield from _overfitting(stage, held_out, "NLL")


def _reward_model(stage: StageRecord) -> Iterator[Finding]:
    """A reward model should order held-out responses as the given rewards do, better than chance."""
    accuracy, correlation = stage.agreement.accuracy, stage.agreement.correlation()
    if accuracy is None and correlation is None:
        yield Finding(
            stage.name,
            "info",
            "Nothing was held out, so nobody knows how well it scores.",
            "Give `data.eval`, or set some prompts aside with `data.eval_fraction`.",
        )
        return
    if accuracy is not None:
        better = (accuracy.value if accuracy.low is None else accuracy.low) > 0.5
        yield Finding(
            stage.name,
            "good" if better else "bad",
            f"Of held-out pairs {short(100 * accuracy.value, 1)} % have the higher reward on the "
            "better response." + ("" if better else " That is no better than chance."),
            None if better else "More data, more steps or another learning rate.",
        )
    if correlation is not None:
        named = ", ".join(f"{n} {short(v)}" for n, v in stage.agreement.correlations.items())
        yield Finding(
            stage.name,
            "info" if correlation > 0 else "bad",
            f"Correlation with held-out ratings: {named}.",
        )
    yield from _overfitting(stage, stage.curve("eval_loss"), "loss")


def _overfitting(stage: StageRecord, held_out: Curve, what: str) -> Iterator[Finding]:
    if len(held_out.values) < 3:
        return
    lowest = min(held_out.values)
    if held_out.values[-1] > lowest * 1.02:
        step = held_out.steps[held_out.values.index(lowest)]
        yield Finding(
            stage.name,
            "warn",
            f"Held-out {what} was lowest at step {step} ({short(lowest, 3)}) and rose again.",
            "Train for fewer epochs, or on more data.",
        )


def _step_zero(stage: StageRecord) -> Iterator[Finding]:
    check = stage.step0
    if check is None or check.ok is None:
        return
    numbers = f"loss {short(check.loss, 4)}, expected {short(check.expected, 4)}"
    if check.ok:
        yield Finding(
            stage.name,
            "good",
            f"Step-0 check passed ({numbers}): the reference is what it starts from.",
        )
    else:
        yield Finding(
            stage.name,
            "bad",
            f"Step-0 check failed ({numbers}): policy and reference differ before any update.",
            "Look for a wrong reference, a stale reference cache, dropout left on, or another "
            "chat template.",
        )


def _gap(stage: StageRecord) -> Iterator[Finding]:
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
    yield Finding(stage.name, level, text, advice)


def _saturation(stage: StageRecord) -> Iterator[Finding]:
    targets = [gap.target for gap in stage.gaps if gap.target is not None]
    if stage.kind != "rpo" or not targets:
        return
    bound = math.log(SATURATED / (1 - SATURATED))
    share = sum(abs(target) > bound for target in targets) / len(targets)
    if share > 0.5:
        yield Finding(
            stage.name,
            "warn",
            f"σ(target gap) is above {SATURATED} or below {1 - SATURATED:.2f} for {share:.0%} of "
            "the examples: there RPO asks for no more than DPO does.",
            "Lower reward_scale (η), so that rewards tell small gaps from large ones.",
        )


def _cut_responses(stage: StageRecord) -> Iterator[Finding]:
    share = stage.scores.unfinished
    if share is not None and share > MANY_CUT:
        yield Finding(
            stage.name,
            "warn",
            f"{share:.0%} of the sampled responses were cut by max_new_tokens before they ended.",
            "Raise max_new_tokens, or look whether responses grow longer stage by stage.",
        )


def _said(stage: StageRecord) -> Iterator[Finding]:
    """What was warned of while the stage trained, as it was then."""
    for said in stage.said:
        when = "In training" if said.step is None else f"In training, at step {said.step}"
        advice = f"To try: {said.advice}." if said.advice else None
        yield Finding(stage.name, "warn", f"{when}: {said.text}.", advice)


def _data(stage: StageRecord) -> Iterator[Finding]:
    """What the audit of the training data found."""
    for concern in stage.audit.concerns("the rows", sampled=stage.samples_data):
        yield Finding(
            stage.name, "info" if concern.minor else "warn", f"{concern.text}.", concern.advice
        )


def _hub(stage: StageRecord) -> Iterator[Finding]:
    """Where the output was to be uploaded."""
    repo, error = stage.hub.get("repo"), stage.hub.get("error")
    if repo and error:
        yield Finding(
            stage.name,
            "warn",
            f"The output is not on the hub ({repo}): {error}.",
            f"It is complete in `{stage.name}/final`: hf upload {repo} {stage.name}/final",
        )
    elif repo:
        yield Finding(stage.name, "info", f"The output is on the hub: {repo}.")


def _headline(run: RunRecord) -> str:
    done = sum(stage.state == "done" for stage in run.stages)
    if not run.stages:
        return "Nothing has run yet."
    plural = "s" if len(run.stages) > 1 else ""
    text = (
        f"The chain finished: {done} stage{plural}."
        if run.finished
        else f"The chain is not finished: {done} of {len(run.stages)} stage{plural} done."
    )
    return text + whole_change(run)
