"""The command line, `rpo-trainer`.

commands    `main` and the commands on recipes and runs
compare     the command that compares runs
rewards     the commands on rewards
options     their options, made of the recipe's fields
"""

from rpo_trainer.cli.commands import main

__all__ = ["main"]
