"""Convert config files of other trainers to recipes.

recognize       which tool a file is from, by its keys
foreign_config  a file of another tool: values, lines, and the fate of each key
draft           the new recipe: values, comments, text
paths           relative paths of the file → paths relative to the recipe
arguments       fields of `transformers.TrainingArguments`, shared by these tools
adapters        LoRA and QLoRA settings
llama_factory   LLaMA-Factory YAML
dataset_info    LLaMA-Factory's dataset_info.json → sources
axolotl         Axolotl YAML
axolotl_data    Axolotl's `datasets` → sources
trl             YAML for TRL's command line
convert         `convert_file`: a file → the text of a valid recipe, and the keys that were not converted
"""
