"""DPO as a command-line program: arguments of script, training and model come from a parser."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

if len(sys.argv) == 1:
    sys.argv += [
        "--dataset_name", "org/pairs", "--model_name_or_path", "org/base-model", "--use_peft",
        "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--output_dir", "dpo-cli",
        "--loss_type", "sigmoid", "--precompute_ref_log_probs", "--padding_free", "true",
        "--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none",
        "--save_strategy", "no",
    ]  # fmt: skip
parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
trainer = DPOTrainer(
    AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path),
    args=training_args,
    train_dataset=load_dataset(script_args.dataset_name, split=script_args.dataset_train_split),
    processing_class=AutoTokenizer.from_pretrained(model_args.model_name_or_path),
    peft_config=get_peft_config(model_args),
)
trainer.train()
trainer.save_model(training_args.output_dir)
