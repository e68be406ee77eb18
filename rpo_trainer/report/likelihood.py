"""Likelihood decline, in plain words: do the chosen responses become less likely, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from rpo_trainer.report.collect import Curve, StageRecord
from rpo_trainer.report.findings import Finding
from rpo_trainer.report.values import short

# A fall of the chosen log-prob by less than this many nats per response, or than this share of its
# size, is noise.
DECLINE_NATS = 0.5
DECLINE_SHARE = 0.02


def judge_likelihood(stage: StageRecord) -> Iterator[Finding]:
    """Likelihood decline: the chosen response became less likely than under the reference."""
    delta = chosen_delta(stage)
    if not delta:
        return
    change, level_of_logps = delta.end(), stage.curve("logps/chosen")
    falling = stage.curve("logps/chosen_falling")
    share = f"; it fell in {falling.end():.0%} of the examples" if falling else ""
    bound = max(
        DECLINE_NATS, DECLINE_SHARE * abs(level_of_logps.start()) if level_of_logps else 0.0
    )
    if change >= 0:
        text = f"The log-prob of chosen responses rose by {short(change)} nats per response{share}."
        yield Finding(stage.name, "good", text)
    elif -change <= bound:
        text = (
            f"The log-prob of chosen responses hardly fell, by {short(-change)} nats per response"
        )
        yield Finding(stage.name, "good", f"{text}{share}.")
    else:
        size = abs(level_of_logps.start()) if level_of_logps else 0.0
        relative = f" ({-change / size:.0%} of its size)" if size else ""
        text = (
            f"Likelihood decline: the log-prob of chosen responses fell by {short(-change)} nats "
            f"per response{relative}{share}. {_rejected_too(stage, change)}"
        )
        yield Finding(stage.name, "warn", text, _decline_advice(stage))


def _rejected_too(stage: StageRecord, chosen_change: float) -> str:
    """Where the margin came from, if the chosen log-prob fell."""
    rejected = rejected_delta(stage)
    if not rejected:
        return "A margin then comes from pushing rejected responses down, not chosen ones up."
    fall = short(-rejected.end())
    if rejected.end() < chosen_change:
        return f"Rejected ones fell by {fall}: the margin comes from pushing them down alone."
    return "Rejected ones did not fall by more, so that there is no margin either."


def _decline_advice(stage: StageRecord) -> str:
    weight, beta = stage.setting("sft_loss_weight"), stage.setting("beta")
    advice = []
    if not weight:
        advice.append("set sft_loss_weight above 0 (it is 0), which holds the chosen log-prob up")
    else:
        advice.append(f"raise sft_loss_weight (it is {weight:g}; try three times as much)")
    advice.append(f"raise β (it is {beta:g})" if beta else "raise β")
    advice.append("lower the learning rate or train fewer steps")
    text = "; or ".join(advice) + "."
    return text[0].upper() + text[1:]


def chosen_delta(stage: StageRecord) -> Curve:
    """Log-prob of chosen responses minus the reference's, nats per response; may be empty."""
    return stage.curve("logps/chosen_delta") or _delta(stage, "chosen")


def rejected_delta(stage: StageRecord) -> Curve:
    """As `chosen_delta`, of rejected responses; from their implicit reward, which is β times it."""
    return stage.curve("logps/rejected_delta") or _delta(stage, "rejected")


def _delta(stage: StageRecord, which: str) -> Curve:
    beta, rewards = stage.setting("beta"), stage.curve(f"rewards/{which}")
    if not beta or not rewards:
        return Curve([], [])
    return Curve(rewards.steps, [value / beta for value in rewards.values])
