"""Early warnings: one-line warnings of common problems of preference training while it runs.

They compare means over at least the last 64 examples with thresholds:

- `chosen_falling`: chosen log-probs are below the reference model's by 10% of their absolute value and by
  2 nats per response;
- `targets_saturated`: σ(target gap) is below 0.01 or above 0.99 for half of the examples (RPO's KL losses);
- `margins_exploding`: the implicit reward gap is above 10 and, with rewards, above 3 times the target gap;
- `chosen_unlearned`: pair accuracy is at least 0.99 while chosen log-probs are below the reference model's
  by 2% of their absolute value and by 0.5 nats per response.

Each is logged once per run. They only depend on the log lines, so a resumed run does not repeat them.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback

from rpo_trainer.losses import LOSSES

logger = logging.getLogger(__name__)

EXAMPLES = 64  # log lines are averaged until they cover this many examples
FALLING_NATS, FALLING_FRACTION = 2.0, 0.1
UNLEARNED_NATS, UNLEARNED_FRACTION = 0.5, 0.02
ALWAYS_RIGHT = 0.99
SATURATED_GAP = math.log(0.99 / 0.01)  # σ of it is 0.99
SATURATED_FRACTION = 0.5
EXPLODED = 10.0  # σ(10) = 0.99995: the DPO loss is close to 0
EXPLODED_FACTOR = 3.0  # of the target gap


@dataclass(frozen=True)
class EarlyWarning:
    """A warning: the observation (`text`), and what to try (`advice`, with names of recipe keys)."""

    name: str
    text: str
    advice: str


def find_warnings(means: Mapping[str, float], args: Any) -> Iterator[EarlyWarning]:
    """Yield the warnings for these metrics.

    Args:
        means: training metrics of a preference trainer by name; missing ones are not checked.
        args: its `PreferenceConfig`.
    """
    delta, level = means.get("logps/chosen_delta"), means.get("logps/chosen")
    fall = -delta if delta is not None else 0.0
    size = abs(level - delta) if level is not None and delta is not None else 0.0  # the reference's
    if fall > max(FALLING_NATS, FALLING_FRACTION * size):
        yield EarlyWarning(
            "chosen_falling",
            f"chosen log-probs are {_below(fall, size)}: the chosen responses become less likely, in favor "
            "of text outside the examples",
            f"{_chosen_advice(args)}, or lower learning_rate",
        )
    saturated = means.get("rewards/target_saturated", 0.0) > SATURATED_FRACTION
    if saturated and LOSSES[args.loss_type].saturates:
        yield EarlyWarning(
            "targets_saturated",
            f"σ(target gap) is near 0 or 1 for {means['rewards/target_saturated']:.0%} of the "
            "examples: their rewards have no more information than labels, and RPO becomes DPO",
            f"lower reward_scale (now {args.reward_scale:g}), or use `reward_scale: auto`",
        )
    margin, target = means.get("rewards/margins", 0.0), means.get("rewards/target_gap")
    limit = EXPLODED if target is None else max(EXPLODED, EXPLODED_FACTOR * abs(target))
    if margin > limit:
        target_note = "" if target is None else f" (target: {target:.3g})"
        yield EarlyWarning(
            "margins_exploding",
            f"the implicit reward gap is {margin:.3g}{target_note}: the policy moves far from the reference "
            "model, and its samples may degrade",
            f"lower learning_rate, raise beta (now {args.beta:g}), or train fewer steps",
        )
    accuracy = means.get("rewards/accuracies", 0.0)
    if accuracy >= ALWAYS_RIGHT and fall > max(UNLEARNED_NATS, UNLEARNED_FRACTION * size):
        yield EarlyWarning(
            "chosen_unlearned",
            f"rewards/accuracies is {accuracy:.3g}, and chosen log-probs are {_below(fall, size)}: pairs are "
            "already ranked correctly, and further steps only make both responses less likely",
            f"{_chosen_advice(args)}, or stop earlier (num_train_epochs, max_steps)",
        )


def _below(fall: float, size: float) -> str:
    percent = f" ({fall / size:.0%})" if size else ""
    return f"{fall:.3g} nats per response below the reference model's{percent}"


def _chosen_advice(args: Any) -> str:
    """Return advice to keep the chosen responses likely."""
    weight = "set" if not args.sft_loss_weight else "raise"
    return (
        f"{weight} sft_loss_weight (now {args.sft_loss_weight:g}), raise beta (now {args.beta:g})"
    )


class EarlyWarnings(TrainerCallback):
    """Logs each warning once, when its condition is first met; added by every preference trainer.

    Args:
        note: called with all warnings so far, as dicts with their `step`, when training begins and after each
            new warning.

    Attributes:
        found: all warnings so far.
    """

    def __init__(self, note: Callable[[list[dict[str, Any]]], None] | None = None) -> None:
        self.note = note
        self._forget()

    def _forget(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._lines: deque[tuple[int, Mapping[str, float]]] = deque()  # (examples, metrics)
        self._step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the warnings of earlier log lines of a resumed run, so that they are not repeated."""
        self._forget()
        for line in state.log_history:
            self._look(args, line["step"], line)
        if self.note is not None:
            self.note(self.found)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        new = self._look(args, state.global_step, logs or {})
        if not new:
            return
        if state.is_world_process_zero:
            for warning in new:
                logger.warning(
                    "step %d: %s. Try: %s", state.global_step, warning.text, warning.advice
                )
        if self.note is not None:
            self.note(self.found)

    def _look(self, args: Any, step: int, logs: Mapping[str, Any]) -> list[EarlyWarning]:
        """Return new warnings after this log line."""
        if "loss" not in logs or "rewards/margins" not in logs:
            return []
        self._lines.append(((step - self._step) * args.examples_per_step(), logs))
        self._step = step
        while sum(n for n, _ in self._lines) - self._lines[0][0] >= EXAMPLES:
            self._lines.popleft()
        total = sum(n for n, _ in self._lines)
        if total < EXAMPLES:
            return []
        means = {
            name: sum(n * line[name] for n, line in self._lines) / total
            for name in logs
            if "/" in name and all(name in line for _, line in self._lines)
        }
        known = {entry["name"] for entry in self.found}
        new = [w for w in find_warnings(means, args) if w.name not in known]
        self.found += [{"step": step, **asdict(warning)} for warning in new]
        return new
