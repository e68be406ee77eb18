"""The chain: a recipe's stages, each seeded by the one before it, resumable at every point."""

from rpo_trainer.chain.asked import default_run_dir, select_stage
from rpo_trainer.chain.run import run_chain

__all__ = ["default_run_dir", "run_chain", "select_stage"]
