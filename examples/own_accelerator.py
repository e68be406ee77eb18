"""Inside a program that has made its own Accelerator, and prepared the model with it.

The trainer makes an Accelerator of its own from its arguments, and prepares the model again: so it is the
arguments that say bf16, the batch and the accumulation. What the program's own Accelerator is used for before
and after (logging, one process at a time, evaluation) goes on as it was.

    python examples/own_accelerator.py        or: accelerate launch examples/own_accelerator.py
"""

from __future__ import annotations

from accelerate import Accelerator
from tiny import ROWS, SETTINGS, TOKENIZER, model

from rpo_trainer import DPOConfig, DPOTrainer

accelerator = Accelerator(mixed_precision="bf16")
policy = accelerator.prepare(model())

args = DPOConfig(**SETTINGS, beta=0.1, bf16=True)
trainer = DPOTrainer(policy, args=args, train_dataset=ROWS, processing_class=TOKENIZER)
trainer.train()

accelerator.wait_for_everyone()
margins = [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row]
accelerator.print(f"margin {margins[0]:.3f} → {margins[-1]:.3f}, step 0: {trainer.step_zero}")
if accelerator.is_main_process:
    accelerator.unwrap_model(trainer.model).save_pretrained("out/model")
