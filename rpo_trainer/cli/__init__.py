"""The command line, `rpo-trainer`.

commands          `main` and the commands on runs
inspect_recipe    `check`, `plan`, `preview`
  template          `check --template`
compare           `compare`
rewards           the commands on rewards
arguments         arguments and options that several commands share
options           options made from the fields of a recipe
convert           `convert`: configs of other tools
init              `init`: a new recipe from a model and data
watch             `status --watch`
json_output       `--json`: one object, errors included
"""

from rpo_trainer.cli.commands import main

__all__ = ["main"]
