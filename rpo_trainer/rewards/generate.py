"""Responses sampled from a policy with transformers' own `generate`.

What a checkpoint says about decoding (a temperature, a repetition penalty, a top-k) is set aside:
the responses come from the policy itself, as the caller's arguments shape it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rpo_trainer.data import encode_prompt, end_token_ids
from rpo_trainer.data.rows import RowError
from rpo_trainer.errors import DataError, ModelError, RecipeError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[dict[str, Any]]
Tools = Sequence[list[dict[str, Any]] | None]  # of each prompt


class Sample(NamedTuple):
    """One response; `finished` is False where it was cut by `max_new_tokens`."""

    text: str
    finished: bool


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    responses: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    tools: Tools | None = None,
) -> list[list[Sample]]:
    """K sampled responses for each prompt, in the prompts' order.

    The same arguments give the same responses whatever the state of the global generators, which
    are left as they were, as are the model's mode and its configs. `batch_size` belongs to the
    arguments: it decides which random number meets which prompt.

    Args:
        prompts: texts, or lists of messages for the tokenizer's chat template.
        responses: K, at least 1.
        max_new_tokens: limit of a response, its end token included.
        temperature: above 0; 1 samples from the policy as it is.
        top_p: the smallest set of tokens with this probability in all; 1 is every token.
        top_k: the k likeliest tokens; 0 is every token.
        batch_size: responses decoded at once; a prompt's K are never parted.
        tools: function descriptions of each prompt, for the chat template.

    Raises:
        RecipeError: an argument out of its range, or longer than the model's context.
        ModelError: no end token.
        DataError: a prompt without a token, messages that the chat template refuses, or without one.
    """
    if not temperature > 0 or not 0 < top_p <= 1 or top_k < 0 or responses < 1:
        raise RecipeError(
            f"cannot sample {responses} responses with temperature {temperature}, "
            f"top_p {top_p} and top_k {top_k}",
            where="generate",
            fix="responses >= 1, temperature > 0, 0 < top_p <= 1, top_k >= 0",
        )
    decoding = {
        "do_sample": True,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "num_return_sequences": responses,
    }
    return _generate(model, tokenizer, prompts, decoding, max_new_tokens, batch_size, seed, tools)


def greedy_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    tools: Tools | None = None,
) -> list[Sample]:
    """The likeliest next token at every step: one response a prompt; else as `sample_responses`."""
    decoding = {"do_sample": False, "num_return_sequences": 1}
    found = _generate(model, tokenizer, prompts, decoding, max_new_tokens, batch_size, 0, tools)
    return [sample for (sample,) in found]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: dict[str, Any],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    tools: Tools | None,
) -> list[list[Sample]]:
    """Batches of prompts of like length, longest first: memory runs out at once or never."""
    if max_new_tokens < 1 or batch_size < 1:
        raise RecipeError("max_new_tokens and batch_size must be at least 1", where="generate")
    encoded = [
        _encode(tokenizer, prompt, tools[index] if tools is not None else None, index)
        for index, prompt in enumerate(prompts)
    ]
    _check_context(model, encoded, max_new_tokens)
    ends = _end_tokens(model, tokenizer)
    config = _generation_config(tokenizer, ends, max_new_tokens, decoding)
    copies = decoding["num_return_sequences"]
    prompts_per_batch = max(1, batch_size // copies)
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    found: list[list[Sample]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    with _seeded(device, seed), _set_aside(model):
        for start in range(0, len(order), prompts_per_batch):
            batch = order[start : start + prompts_per_batch]
            rows = _generate_batch(model, [encoded[index] for index in batch], config, device)
            for place, index in enumerate(batch):
                to_text = _decoder(tokenizer, prompts[index], encoded[index])
                for row in rows[place * copies : (place + 1) * copies]:
                    found[index].append(_sample(row, ends, to_text))
    return found


def _generate_batch(
    model: PreTrainedModel, encoded: list[list[int]], config: GenerationConfig, device: torch.device
) -> list[list[int]]:
    """The new tokens of each response: [prompts × K] lists, those of a prompt side by side."""
    width = max(map(len, encoded))
    pad = config.pad_token_id
    ids = [[pad] * (width - len(row)) + row for row in encoded]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in encoded]
    # Not inference_mode: a buffer that the model caches here would be unusable in training.
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
        )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    tools: list[dict[str, Any]] | None,
    index: int,
) -> list[int]:
    try:
        ids = encode_prompt(tokenizer, prompt, tools)
    except RowError as error:
        raise DataError(str(error), where=f"prompt {index}") from error
    if not ids:
        raise DataError("the prompt has no token", where=f"prompt {index}")
    return ids


def _decoder(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, prompt_ids: list[int]
) -> Callable[[list[int]], str]:
    """From the tokens of a response to its text.

    A response to a text is what it adds to that text: decoded alone, a SentencePiece tokenizer
    would lose the space it begins with.
    """

    def decode(ids: list[int]) -> str:
        return str(
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    if not isinstance(prompt, str):
        return decode
    before = decode(prompt_ids)

    def decode_behind_prompt(ids: list[int]) -> str:
        text = decode(prompt_ids + ids)
        return text[len(before) :] if text.startswith(before) else decode(ids)

    return decode_behind_prompt


def _sample(row: list[int], ends: list[int], to_text: Callable[[list[int]], str]) -> Sample:
    stop = next((place for place, token in enumerate(row) if token in ends), None)
    return Sample(to_text(row[:stop]), finished=stop is not None)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a response in training, and the end tokens of the checkpoint, often several."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    listed = named if isinstance(named, list) else [named]
    ends = {*end_token_ids(tokenizer), *(token for token in listed if token is not None)}
    if not ends:
        raise ModelError(
            "the tokenizer has no end token",
            why="a response would never end",
            fix="set eos_token in the tokenizer's files",
        )
    return sorted(ends)


def _generation_config(
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    max_new_tokens: int,
    decoding: dict[str, Any],
) -> GenerationConfig:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
        use_cache=True,
        **decoding,
    )


def _check_context(model: PreTrainedModel, encoded: list[list[int]], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, encoded), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise RecipeError(
            f"the longest prompt has {longest} tokens, and with max_new_tokens {max_new_tokens} "
            f"goes beyond the model's context of {limit}",
            where="generate",
            fix="lower max_new_tokens, or leave the longest prompts out",
        )


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The generators of the CPU and of this device start from `seed`, and are put back after."""
    on_cuda = device.type == "cuda"
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if on_cuda else None
    try:
        # Not torch.manual_seed, which would also seed devices whose state is not kept here.
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)


@contextmanager
def _set_aside(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and an empty generation config; each module's mode is put back after."""
    from transformers import GenerationConfig

    modes = [(module, module.training) for module in model.modules()]
    # An adapter hands its generation config to the model inside it.
    inner = getattr(model, "get_base_model", lambda: model)()
    configs = [(owner, owner.generation_config) for owner in (model, inner)]
    model.eval()  # type: ignore[no-untyped-call]
    try:
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        yield
    finally:
        for owner, config in configs:
            owner.generation_config = config
        for module, training in modes:
            module.training = training
