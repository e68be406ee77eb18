"""Instruction tuning through a formatting function, with a model given by name and older argument names."""

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

MODEL_ID = "org/base-model"
tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)


def to_text(example):
    return (
        f"### Question: {example['question']}\n### Answer: {example['answer']}{tokenizer.eos_token}"
    )


args = SFTConfig(
    output_dir="sft-formatted",
    max_steps=3,
    per_device_train_batch_size=4,
    learning_rate=1e-4,
    warmup_ratio=0.1,
    max_seq_length=200,
    dataset_text_field="text",
    model_init_kwargs={"attn_implementation": "sdpa"},
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
trainer = SFTTrainer(
    MODEL_ID,
    args=args,
    train_dataset=load_dataset("org/questions", split="train"),
    formatting_func=to_text,
    tokenizer=tokenizer,
    compute_metrics=None,
    data_collator=None,
)
trainer.train()
