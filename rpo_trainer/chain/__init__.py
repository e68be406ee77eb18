"""The chain: the stages of a recipe run one after the other, each on the output of one before it.

run               `run_chain`: the stages in order; a run that was stopped resumes
  run_dir           the run directory: checked, made, locked
  state             chain.json: what a run knows of its stages
  changes           recipe settings that differ from the last start: refused, or allowed by key
  input_files       the files and hub commits that stages read, and their digests
  finished          before a run resumes: outputs are intact, and what a stage starts from is there
  models            models loaded for a stage (start, reference), and its output written
  training          one stage trained from its last checkpoint to its end
  callbacks         metrics.jsonl, and the step-0 result
  stop_signal       SIGTERM and SIGINT: a stop after a complete checkpoint
  progress          progress bars, or plain lines
  evaluation        held-out figures of an output: responses, pairs, likelihoods, lm-eval tasks
  response_figures  held-out responses tokenized, for their lengths and log-probs
  system            the hardware and software that a stage trains on
  card              the model card of an output
check             `check_recipe`: all that can be known before training
  check_models      models without their weights: configurations, adapters, tokenizers, embeddings
  check_data        the data, prepared as for training and counted
  findings          errors and lines of a check, collected
selection         the run directory and the stage that a command works on
"""

from rpo_trainer.chain.run import run_chain
from rpo_trainer.chain.selection import default_run_dir, select_stage

__all__ = ["default_run_dir", "run_chain", "select_stage"]
