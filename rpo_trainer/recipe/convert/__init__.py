"""Config files of other trainers → recipes.

recognize       which tool a file belongs to, by its keys
foreign_config  a file of another tool: its values, its lines, and what becomes of each key
draft           the recipe being written: values, comments, text
paths           relative paths of the file → paths relative to the recipe
arguments       fields of `transformers.TrainingArguments`, which these tools share
adapters        LoRA and QLoRA settings
llama_factory   LLaMA-Factory YAML
dataset_info    LLaMA-Factory's dataset_info.json → sources
axolotl         Axolotl YAML
axolotl_data    Axolotl's `datasets` → sources
trl             YAML for TRL's command line
convert         `convert_file`: a file → the text of a valid recipe, and what was left out
"""
