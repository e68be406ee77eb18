"""The command line, `rpo-trainer`."""

from rpo_trainer.cli.commands import main

__all__ = ["main"]
