"""Fine-tuning on rows that the script tokenizes itself, prompts masked in the labels."""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

name = "org/base-model"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def tokenize(row):
    prompt = tokenizer(row["question"] + " ")["input_ids"]
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


rows = load_dataset("org/questions", split="train").map(
    tokenize, remove_columns=["question", "answer"]
)
trainer = SFTTrainer(
    model,
    SFTConfig(
        output_dir="sft-tokenized",
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        padding_free=True,
        use_liger_kernel=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=rows,
    processing_class=tokenizer,
)
trainer.train()
