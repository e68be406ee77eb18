"""The command line, `rpo-trainer`.

commands          `main`, the commands on runs, the command list
inspect_recipe    `check`, `plan`, `preview`
  template          `check --template`
compare           `compare`
rewards           the commands on rows: `score`, `generate`, `pairs`, `calibrate`, `audit`
arguments         arguments, options and output that several commands share
options           options generated from the fields of a recipe
convert           `convert`: configs of other tools
init              `init`: a new recipe from a model and data files
watch             `status --watch`
json_output       `--json`: one object, errors included
"""

from rpo_trainer.cli.commands import main

__all__ = ["main"]
