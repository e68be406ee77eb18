"""The command line, `rpo-trainer`.

commands    `main` and the commands on recipes and runs
rewards     the commands on rewards
convert     `convert`: configs of other tools
init        `init`: a new recipe from a model and data
options     their options, made of the recipe's fields
"""

from rpo_trainer.cli.commands import main

__all__ = ["main"]
