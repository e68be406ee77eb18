"""The command line, `rpo-trainer`."""

from rpo_trainer.cli.main import main

__all__ = ["main"]
