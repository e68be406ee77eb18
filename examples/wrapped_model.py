"""A model that is already wrapped by PEFT: its adapter is trained, and it is its own reference model.

`ref_model=None` means the policy at the start of training, including its adapter: an adapter from one run is
both the start and the reference of the next one. (In TRL the reference is the model without adapter.)
Reference log-probs are computed once, before the first step; no second adapter is kept in memory.

    python examples/wrapped_model.py
"""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ROWS, SETTINGS, TOKENIZER, model

from rpo_trainer import RPOConfig, RPOTrainer, SFTConfig, SFTTrainer

lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM")
policy = get_peft_model(model(), lora)

rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in ROWS]
SFTTrainer(policy, SFTConfig(**SETTINGS), rows, processing_class=TOKENIZER).train()

args = RPOConfig(**SETTINGS, beta=0.5, reward_scale=1.0)
trainer = RPOTrainer(policy, args=args, train_dataset=ROWS, processing_class=TOKENIZER)
trainer.train()
print("step 0:", trainer.step_zero)

trainer.save_model("out/adapter")  # only the adapter
again = PeftModel.from_pretrained(model(), "out/adapter")
again.merge_and_unload().save_pretrained("out/merged")
