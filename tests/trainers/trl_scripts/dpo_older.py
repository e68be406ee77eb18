"""An older DPO script, with a limit for prompts. It stops, and the error says why."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model = AutoModelForCausalLM.from_pretrained("org/base-model")
tokenizer = AutoTokenizer.from_pretrained("org/base-model")
trainer = DPOTrainer(
    model=model,
    ref_model=None,
    args=DPOConfig(
        output_dir="dpo-older",
        max_length=256,
        max_prompt_length=128,
        report_to="none",
    ),
    train_dataset=load_dataset("org/pairs", split="train"),
    tokenizer=tokenizer,
)
trainer.train()
