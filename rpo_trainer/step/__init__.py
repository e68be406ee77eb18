"""One training step, in the order in which it runs.

    order            which examples meet in which optimizer step
    packing          examples → one packed row per micro-batch: each prompt once, its responses after it
    batch            what that is: the inputs of the model, index tensors, and who sees whom in the row
    attention        the attention function that transformers calls, by who sees whom
      attention_reach    windows and chunks of each layer, from the masks that the model makes
      attention_varlen   the whole row in one kernel call, on a GPU in half precision
      attention_flex     the same for soft-capped scores and attention sinks
    forward          one forward of the transformers model, head included
    head             what the model does between its last hidden states and its logits
    logprobs         hidden states → log-probability of each trained token, in tiles of the vocabulary
      head_kernels       softmax and gradient of a tile in Triton
      token_stats        accuracy, entropy and mean logit of each token, from the same tiles
    router_loss      mixtures of experts: the load-balancing loss of the same forward

The log-probabilities go to `rpo_trainer.losses`. Beside the step: `reference` computes the reference's
log-probabilities once and keeps them on disk; at the start `layout_probe` takes the fastest layout that
`layout_proof` shows to give what plain forwards of the model give.
"""
