"""Responses are sampled and scored, made into preference rows, and the scale of the rewards is fitted.

- Sample: `policies` (rows of prompts to rows of responses, from models here and behind endpoints), `sample`
  (one model here, batch by batch), `drawing` (how a token is drawn), `sampled_text` (tokens to text).
- Score: `scorers` (one class for each way), `verifiers/` (the table `VERIFIERS`), `reward_model`, `judge`, `vllm_scores`;
  `endpoint` asks a server, with `endpoint_messages` (what it is told) and `http_client`.
- Pair and calibrate: `pairs`, `calibrate`. `evaluate` turns rewards and log-probs into figures.
- Commands: `commands` is what the commands on rewards do, `row_files` the rows as they read and write them.
  Long work goes through `data.resumable_rows`, so that what is done survives a kill.
"""
