"""Policies with known responses, for the tests of sampling."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.rewards.sample import Sample

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
PROMPTS = ["reverse abc: ", "x", "12 plus 30: ", "put dcba in order: ", "ab"]


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,  # sharp distributions: greedy choices without near ties
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def next_token_model(table: dict[str, dict[str, float]]) -> LlamaForCausalLM:
    """A Llama whose next token depends on the last one alone, with the given probabilities.

    All layers are silent, the embedding of a token is one-hot, and the head holds log-probs.
    """
    tokenizer = character_tokenizer()
    model = llama(hidden_size=100, num_attention_heads=2, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(100))
        model.lm_head.weight.fill_(-100.0)
        for last, follows in table.items():
            for token, probability in follows.items():
                row = tokenizer.convert_tokens_to_ids(token)
                column = tokenizer.convert_tokens_to_ids(last)
                logit = torch.tensor(probability).log()
                # The final norm makes a one-hot vector of 100 entries ten times as long.
                model.lm_head.weight[row, column] = logit / 10
    return model


def plain_greedy(model: LlamaForCausalLM, prompt: str, limit: int) -> Sample:
    """Token by token, for one prompt, without cache and padding."""
    tokenizer = character_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + limit:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token == tokenizer.eos_token_id:
            return Sample(tokenizer.decode(ids[start:], skip_special_tokens=True), True)
        ids.append(token)
    return Sample(tokenizer.decode(ids[start:], skip_special_tokens=True), False)
