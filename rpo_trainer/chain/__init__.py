"""The chain: a recipe's stages, each seeded by the one before it, resumable at every point."""

from rpo_trainer.chain.run import run_chain
from rpo_trainer.chain.selection import default_run_dir, select_stage

__all__ = ["default_run_dir", "run_chain", "select_stage"]
