"""Stages prepared for training: data, settings and records, shared by `run`, `check`, `plan` and `preview`.

prepare           `StagePreparer`: a stage's sources → rows → tokenized examples, and its held-out rows
inputs            `StageInputs`: what a stage trains on; the rules of each kind of stage
scored_rows       rows that a run makes itself: responses sampled from policies, and their rewards
settings          a stage → its training arguments, its LoRA adapter, its trainer
output_dtype      the dtype of what a stage delivers, and how long its exact weights are kept
lm_eval_tasks     lm-eval tasks on a model in memory
record            `StageRecord`: what chain.json says of a stage; read by resume, model card and report
error_places      errors of a stage get its place in the recipe: part, file, line
hub               pushes to the hub, and commits of inputs on it

For people:
  preview           training examples token by token, colored by what is trained
  inspect_data      one data set on its own: what would be dropped, refused, trained on
  template_check    what a chat template makes of sample conversations
"""
