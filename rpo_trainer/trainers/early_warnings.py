"""Early warnings: what goes wrong in preference training, said in one line while there is time to act.

As a mean over the last 64 examples or more,

- `chosen_falling`: chosen log-probs are below the reference's by 10 % of their size and by 2 nats a response;
- `targets_saturated`: σ(target gap) is below 0.01 or above 0.99 for half of the examples (RPO's KL losses);
- `margins_exploding`: the implicit gap is above 10 and, with given rewards, above 3 times their target gap;
- `chosen_unlearned`: rewards/accuracies are 0.99 or more while chosen log-probs are below the reference's by
  2 % of their size and by 0.5 nats a response.

Each is given once a run. They follow from the log lines alone, so a resumed run gives none twice.
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

EXAMPLES = 64  # fewer say little: log lines are put together until they hold so many
FALLING_NATS, FALLING_SHARE = 2.0, 0.1
UNLEARNED_NATS, UNLEARNED_SHARE = 0.5, 0.02
ALWAYS_RIGHT = 0.99
SATURATED_GAP = math.log(0.99 / 0.01)  # σ of it is 0.99
SATURATED_SHARE = 0.5
EXPLODED = 10.0  # σ(10) = 0.99995: DPO has nothing left to ask for
EXPLODED_TIMES = 3.0  # of the target gap


@dataclass(frozen=True)
class EarlyWarning:
    """What was seen and what it means (`text`), and what to try (`advice`, with names of recipe keys)."""

    name: str
    text: str
    advice: str


def find_warnings(means: Mapping[str, float], args: Any) -> Iterator[EarlyWarning]:
    """The warnings that these metrics deserve.

    Args:
        means: training metrics of a preference trainer by name; what is missing is not judged.
        args: its `PreferenceConfig`.
    """
    delta, level = means.get("logps/chosen_delta"), means.get("logps/chosen")
    fall = -delta if delta is not None else 0.0
    size = abs(level - delta) if level is not None and delta is not None else 0.0  # the reference's
    if fall > max(FALLING_NATS, FALLING_SHARE * size):
        yield EarlyWarning(
            "chosen_falling",
            f"chosen log-probs are {_below(fall, size)}: the policy unlearns the responses it should "
            "prefer, and what it says instead is in no example",
            f"{_hold_up(args)}, or lower learning_rate",
        )
    saturated = means.get("rewards/target_saturated", 0.0) > SATURATED_SHARE
    if saturated and LOSSES[args.loss_type].saturates:
        yield EarlyWarning(
            "targets_saturated",
            f"σ(target gap) is near 0 or 1 for {means['rewards/target_saturated']:.0%} of the "
            "examples: their rewards say no more than a label does, and RPO becomes DPO",
            f"lower reward_scale (it is {args.reward_scale:g}), or let `reward_scale: auto` fit it",
        )
    margin, target = means.get("rewards/margins", 0.0), means.get("rewards/target_gap")
    limit = EXPLODED if target is None else max(EXPLODED, EXPLODED_TIMES * abs(target))
    if margin > limit:
        asked = "" if target is None else f", and {target:.3g} is asked for"
        yield EarlyWarning(
            "margins_exploding",
            f"the implicit gap is {margin:.3g}{asked}: the policy runs away from the reference, and "
            "its samples soon fall apart",
            f"lower learning_rate, raise beta (it is {args.beta:g}), or train fewer steps",
        )
    accuracy = means.get("rewards/accuracies", 0.0)
    if accuracy >= ALWAYS_RIGHT and fall > max(UNLEARNED_NATS, UNLEARNED_SHARE * size):
        yield EarlyWarning(
            "chosen_unlearned",
            f"rewards/accuracies are {accuracy:.3g}, and chosen log-probs are {_below(fall, size)}: "
            "every pair is in order already, and further steps only push both responses down",
            f"{_hold_up(args)}, or stop earlier (num_train_epochs, max_steps)",
        )


def _below(fall: float, size: float) -> str:
    share = f" ({fall / size:.0%} of their size)" if size else ""
    return f"{fall:.3g} nats a response below the reference's{share}"


def _hold_up(args: Any) -> str:
    """What keeps the chosen response likely."""
    weight = "set" if not args.sft_loss_weight else "raise"
    return f"{weight} sft_loss_weight (it is {args.sft_loss_weight:g}), raise beta (it is {args.beta:g})"


class EarlyWarnings(TrainerCallback):
    """Says each warning once, when it first holds; every preference trainer has one.

    Args:
        note: called with all warnings so far, as plain data with their `step`: when training begins
            and whenever there is a new one.

    Attributes:
        found: the same.
    """

    def __init__(self, note: Callable[[list[dict[str, Any]]], None] | None = None) -> None:
        self.note = note
        self._forget()

    def _forget(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._lines: deque[tuple[int, Mapping[str, float]]] = deque()  # (examples, metrics)
        self._step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run knows its log lines: what they have given is not said again."""
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
        """The warnings that are new with this log line."""
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
