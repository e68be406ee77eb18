"""The chain: the stages of a recipe, run in order, each from the output of an earlier one.

run               `run_chain`: runs the stages in order, and resumes a run that was stopped
  run_dir           the run directory: checked, created, locked
  state             chain.json: the state of a run and its stages
  changes           recipe settings that differ from the last start: refused, or allowed by key
  input_files       the files and hub commits that stages read, and their digests
  finished          before a run resumes: outputs are intact, and the models that stages start from exist
  models            loads the models of a stage (initial policy, reference model) and writes its output
  outputs           the output of a stage, and the exact weights next to it
  training          trains one stage, from its last checkpoint
  callbacks         metrics.jsonl, and the step-0 result
  stop_signal       SIGTERM and SIGINT: stop after a complete checkpoint
  progress          progress bars, or plain lines
  time_left         estimates the time left of a stage and of the chain
  same_examples     compares a stage's examples between processes and with its last start
  data_log          log lines on the data of each stage, once per data set
  evaluation        evaluates an output on held-out data: responses, pairs, likelihoods, lm-eval tasks
  response_figures  held-out responses tokenized, for their lengths and log-probs
  system            the hardware and software that a stage trains on
  card              the model card of an output
check             `check_recipe`: everything that can be checked before training
  check_models      models without their weights: configs, adapters, tokenizers, embeddings
  check_data        the data: prepared as for training, and counted
  findings          collects the errors and lines of a check
selection         the run directory and the stage that a command works on
"""

from rpo_trainer.chain.run import run_chain
from rpo_trainer.chain.selection import default_run_dir, select_stage

__all__ = ["default_run_dir", "run_chain", "select_stage"]
