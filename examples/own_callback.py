"""A callback of one's own: any `transformers.TrainerCallback`, with the metrics of preference training.

This one ends the run when the known fault of DPO shows: chosen responses become less likely than they were.

    python examples/own_callback.py
"""

from __future__ import annotations

from typing import Any

from tiny import ROWS, SETTINGS, TOKENIZER, model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rpo_trainer import DPOConfig, DPOTrainer


class StopWhenChosenFalls(TrainerCallback):
    """Ends training once more than a share of the chosen responses has fallen below the reference."""

    def __init__(self, share: float) -> None:
        self.share = share

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Reads what has just been logged; after the first step, since at the start nothing can fall."""
        if state.global_step > 1 and (logs or {}).get("logps/chosen_falling", 0.0) > self.share:
            control.should_training_stop = True


# Rejected responses that differ from the chosen ones in their last token alone: what pushes one down
# pushes the other down too.
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
