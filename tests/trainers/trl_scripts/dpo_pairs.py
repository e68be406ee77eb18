"""DPO on pairs with a copy of the model as the reference and a sigmoid loss."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

checkpoint = "org/base-model"
policy = AutoModelForCausalLM.from_pretrained(checkpoint)
reference = AutoModelForCausalLM.from_pretrained(checkpoint)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

config = DPOConfig(
    output_dir="dpo",
    beta=0.1,
    loss_type="sigmoid",
    max_length=256,
    truncation_mode="keep_start",
    precompute_ref_log_probs=True,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=5e-6,
    max_steps=2,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="no",
    remove_unused_columns=False,
    report_to="none",
)
pairs = load_dataset("org/pairs", split="train")
trainer = DPOTrainer(
    policy,
    reference,
    args=config,
    train_dataset=pairs,
    eval_dataset=pairs.select(range(4)),
    processing_class=tokenizer,
)
trainer.train()
trainer.evaluate()
