"""Sample and score responses, build preference rows from them, and fit the scale of the rewards.

- Sample: `policies` (prompt rows → response rows, from local models and endpoints), `sample` (one local
  model, batch by batch), `prompts` (prompts → tokens), `drawing` (how a token is drawn), `sampled_text`
  (tokens → text).
- Score: `scorers` (one class for each source of rewards), `verifiers/` (the table `VERIFIERS`),
  `reward_model`, `judge`; `endpoint` sends requests, with `endpoint_messages` and `vllm_scores` (what
  they contain) and `http_client`.
- Pair and calibrate: `pairs`, `calibrate`. `evaluate` computes metrics of rewards and log-probs.
- Commands: `commands` implements the commands on rewards, `row_files` reads and writes their rows.
  Long work goes through `data.resumable_rows`, so that finished rows survive a kill.
"""
