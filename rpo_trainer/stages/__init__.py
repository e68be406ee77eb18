"""Stages prepared for training: data, settings and records, shared by `run`, `check`, `plan` and `preview`.

prepare           `StagePreparer`: from a stage's sources to tokenized examples, also held-out ones
inputs            `StageInputs`: the data a stage trains on; the rules of each kind of stage
scored_rows       rows made by the run: responses sampled from policies, and their rewards
settings          the training arguments, LoRA config and trainer of a stage
output_dtype      the dtype of what a stage delivers, and how long its exact weights are kept
lm_eval_tasks     runs lm-eval tasks on a model in memory
record            `StageRecord`: a stage in chain.json; read by resume, model card and report
error_places      adds the place in the recipe (key, file, line) to errors of a stage
hub               pushes outputs to the hub, and finds commits of inputs

Inspection:
  preview           training examples token by token, colored by what is trained
  inspect_data      one data set: what would be dropped, refused or trained on
  new_recipe        a recipe from a model and data files
  template_check    how a chat template renders sample conversations
"""
