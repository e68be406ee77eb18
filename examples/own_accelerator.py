"""Training within a program that has its own Accelerator and has prepared the model with it.

The trainer creates its own Accelerator from its arguments and prepares the model again, so set bf16, batch
size and accumulation in the arguments. The Accelerator of the program can still be used before and after
training.

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
gaps = [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row]
accelerator.print(
    f"implicit reward gap {gaps[0]:.3f} → {gaps[-1]:.3f}, step 0: {trainer.step_zero}"
)
if accelerator.is_main_process:
    accelerator.unwrap_model(trainer.model).save_pretrained("out/model")
