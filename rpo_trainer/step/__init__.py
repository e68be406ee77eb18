"""The training step: from examples to log-probs.

    order            assigns examples to optimizer steps, ranks and micro-batches
      dealing            deals the examples of a step by least load; idle share of the ranks
    packing          examples → one packed row per micro-batch: each prompt once, followed by its responses
    batch            types of a micro-batch: model inputs, index tensors, attention plan
    attention        attention function for packed rows, called by transformers
      attention_reach    windows and chunks of each layer, determined from the model's masks
      attention_varlen   an entire row in one kernel call, on a GPU in 16-bit precision
      attention_flex     the same for soft-capped scores and attention sinks
    forward          forward of the transformers model, including the head
    head             operations between the last hidden states and the logits
    logprobs         hidden states → log-prob of each trained token, in tiles of the vocabulary
      head_kernels       Triton kernels for softmax and gradient of a tile
      token_stats        accuracy, entropy and mean logit of each token, from the same tiles
    router_loss      load-balancing loss of mixtures of experts, from the same forward
    reference        reference log-probs, computed once and cached on disk
      reference_cache    the values, by content of prompt and response
    layout_probe     selects the fastest exact step layout at the start of training
    layout_proof     compares a step layout with plain forwards of the model

The log-probs are the inputs of `rpo_trainer.losses`.
"""
