"""A custom `transformers.TrainerCallback` that uses the metrics of preference training.

It stops training when chosen responses become less likely than under the reference model, a common problem of
DPO.

    python examples/own_callback.py
"""

from __future__ import annotations

from typing import Any

from tiny import ROWS, SETTINGS, TOKENIZER, model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rpo_trainer import DPOConfig, DPOTrainer


class StopWhenChosenFalls(TrainerCallback):
    """Stops training when too many chosen responses are less likely than under the reference model."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Checks the log line, except that of the first step, where policy and reference are the same."""
        if state.global_step > 1 and (logs or {}).get("logps/chosen_falling", 0.0) > self.fraction:
            control.should_training_stop = True


# Rejected responses only differ in the last token, so that lowering their likelihood lowers that of the
# chosen responses too.
rows = [
    {**row, "chosen": f"it is {row['chosen']}", "rejected": f"it is {row['chosen']}0"}
    for row in ROWS
]
args = DPOConfig(**{**SETTINGS, "max_steps": 40}, beta=0.1)
trainer = DPOTrainer(
    model(),
    args=args,
    train_dataset=rows,
    processing_class=TOKENIZER,
    callbacks=[StopWhenChosenFalls(0.5)],
)
trainer.train()
print(f"stopped after step {trainer.state.global_step} of {args.max_steps}")
