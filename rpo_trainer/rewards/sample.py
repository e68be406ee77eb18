"""Sample responses from a policy with `generate` of transformers.

Each response has its own random numbers, one per token, which depend only on the seed, the prompt's key and
the number of the response: not on the rest of the batch, nor on interruptions. (On hardware whose sums
depend on the shape of a batch, the last bit of the logits may differ, which almost never changes a
token.)

The checkpoint's decoding settings (temperature, repetition penalty, top-k) are ignored: only the
caller's arguments apply.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from rpo_trainer.data import end_token_ids
from rpo_trainer.errors import ModelError, RecipeError
from rpo_trainer.recipe.template_kwargs import kwargs_key
from rpo_trainer.rewards.drawing import Drawing
from rpo_trainer.rewards.prompts import EncodedPrompts, Prompt, Prompts, TemplateKwargs, Tools
from rpo_trainer.rewards.sampled_text import ResponseReader, Sample
from rpo_trainer.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    keys: Sequence[str] | None = None,
    tools: Tools | None = None,
    parsed: Sequence[bool] | None = None,
    template_kwargs: TemplateKwargs | None = None,
    encoded: EncodedPrompts | None = None,
    ranks: Ranks = ALONE,
) -> list[list[Sample]]:
    """Sample K responses for each prompt, in the order of the prompts; arguments as `iter_responses`.

    Args:
        ranks: the processes that share the work; all of them call this function and get all responses.
    """
    with ranks.raise_on_all_ranks():
        own = dict(
            iter_responses(
                model, tokenizer, prompts, range(len(prompts)), responses=responses,
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                batch_size=batch_size, seed=seed, keys=keys, tools=tools, parsed=parsed,
                template_kwargs=template_kwargs, encoded=encoded,
                shard=(ranks.rank(), ranks.world_size()),
            )
        )  # fmt: skip
    found = ranks.all_gather_dict(own)
    return [found[index] for index in range(len(prompts))]


def iter_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    wanted: Collection[int],
    *,
    responses: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    tools: Tools | None = None,
    parsed: Sequence[bool] | None = None,
    template_kwargs: TemplateKwargs | None = None,
    encoded: EncodedPrompts | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, list[Sample]]]:
    """Yield (index of a wanted prompt, its K sampled responses), batch by batch.

    The same seed and keys produce the same responses; the global random generators are not used. The
    model's mode and configs are restored.

    Args:
        model: the policy.
        tokenizer: with its chat template.
        prompts: texts, or lists of messages for the tokenizer's chat template.
        wanted: indices of the prompts to sample for. Batches are built from all prompts, so that a
            resumed run has the same shapes and rounding as an uninterrupted one.
        responses: K, at least 1.
        max_new_tokens: maximum length of a response, end token included.
        temperature: above 0; 1 samples from the unchanged distribution.
        top_p: sample from the smallest set of tokens with this total probability; 1: all tokens.
        top_k: sample from the k most likely tokens; 0: all tokens.
        batch_size: responses decoded at once; the K of a prompt stay together.
        seed: of the random numbers.
        keys: name the random numbers of each prompt; None: its index. Prompts with the same key get the same
            numbers.
        tools: function descriptions for each prompt, for the chat template.
        parsed: whether the text of special tokens in each prompt is converted to the tokens.
        template_kwargs: variables of the chat template for each prompt.
        encoded: token ids of the same prompts from an earlier call; new ones are added. None: encode all.
        shard: (rank, world size): the batches that this process encodes and decodes.

    Raises:
        RecipeError: an argument is out of range, or prompt and response exceed the context length.
        ModelError: there is no end token.
        DataError: a prompt has no tokens, or the chat template refuses it or is missing.
    """
    if not temperature > 0 or not 0 < top_p <= 1 or top_k < 0 or responses < 1:
        raise RecipeError(
            f"cannot sample {responses} responses with temperature {temperature}, "
            f"top_p {top_p} and top_k {top_k}",
            code="recipe.out-of-range",
            where="generate",
            why="logits are divided by the temperature, and at least one token must remain",
            fix="use responses >= 1, temperature > 0, 0 < top_p <= 1, top_k >= 0",
        )
    names = keys if keys is not None else [str(index) for index in range(len(prompts))]
    drawing = Drawing(names, seed, max_new_tokens, temperature, top_p, top_k)
    given = Prompts(prompts, tools, parsed, template_kwargs)
    yield from _generate(
        model, tokenizer, given, encoded, wanted, drawing, responses, max_new_tokens, batch_size,
        shard,
    )  # fmt: skip


def greedy_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    tools: Tools | None = None,
    parsed: Sequence[bool] | None = None,
    template_kwargs: TemplateKwargs | None = None,
    encoded: EncodedPrompts | None = None,
    ranks: Ranks = ALONE,
) -> list[Sample]:
    """Decode one response per prompt greedily; otherwise as `sample_responses`."""
    given = Prompts(prompts, tools, parsed, template_kwargs)
    shard = ranks.rank(), ranks.world_size()
    with ranks.raise_on_all_ranks():
        own = dict(
            _generate(
                model, tokenizer, given, encoded, range(len(prompts)), None, 1, max_new_tokens,
                batch_size, shard,
            )
        )  # fmt: skip
    found = ranks.all_gather_dict(own)
    return [found[index][0] for index in range(len(prompts))]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    encoded: EncodedPrompts | None,
    wanted: Collection[int],
    drawing: Drawing | None,
    copies: int,
    max_new_tokens: int,
    batch_size: int,
    shard: tuple[int, int],
) -> Iterator[tuple[int, list[Sample]]]:
    """Generate in batches of similar size, largest first, so that running out of memory shows immediately.

    Batches are built from the sizes of all prompts in bytes, so that a process encodes only its own.

    Args:
        drawing: the random numbers; None: greedy decoding.
        copies: responses per prompt.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise RecipeError(
            f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}",
            code="recipe.out-of-range",
            where="generate",
            why="a response has at least an end token, and a batch at least one prompt",
            fix="set both to at least 1",
        )
    prompts_per_batch, left = max(1, batch_size // copies), set(wanted)
    sizes = [prompts.size(index) for index in range(len(prompts))]
    order = sorted(range(len(prompts)), key=lambda index: -sizes[index])
    rank, world = shard
    batches = [
        order[start : start + prompts_per_batch]
        for start in range(0, len(order), prompts_per_batch)
    ][rank::world]
    batches = [batch for batch in batches if not left.isdisjoint(batch)]
    own = [index for batch in batches for index in batch]
    encoded = EncodedPrompts() if encoded is None else encoded
    encoded.add(tokenizer, prompts, own, show=rank == 0)
    check_room(model.config, map(encoded.length, own), max_new_tokens)
    ends = _end_tokens(model, tokenizer, prompts.template_kwargs or ())
    config = _generation_config(tokenizer, ends, max_new_tokens)
    device, reader = next(model.parameters()).device, ResponseReader(tokenizer, ends)
    for batch in batches:
        ids = [encoded[index] for index in batch]
        repeated = [each for each in ids for _ in range(copies)]
        with _generation_mode(model):
            width = max(map(len, ids))
            choice = [] if drawing is None else drawing.processors(batch, copies, width)
            rows = _generate_batch(model, repeated, config, choice, device)
        for place, index in enumerate(batch):
            if index in left:
                answers = rows[place * copies : (place + 1) * copies]
                prompt_tokens = prompts.tokens(index, ids[place])
                yield index, [reader.read(prompt_tokens, row) for row in answers]
    reader.warn()


def _generate_batch(
    model: PreTrainedModel,
    encoded: list[list[int]],
    config: GenerationConfig,
    choice: list[LogitsProcessor],
    device: torch.device,
) -> list[list[int]]:
    """Return the new tokens after each encoded prompt."""
    width = max(map(len, encoded))
    pad = config.pad_token_id
    ids = [[pad] * (width - len(row)) + row for row in encoded]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in encoded]
    # Not inference_mode: buffers that the model caches here could not be used in training.
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            logits_processor=LogitsProcessorList(choice),
            synced_gpus=False,  # each process has the full model and its own batches
        )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _end_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Iterable[Mapping[str, Any]],
) -> list[int]:
    """Return the tokens that end a response in training, and the end tokens of the checkpoint."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    listed = named if isinstance(named, list) else [named]
    # One short rendering per set of variables: they may change the end of a turn.
    distinct = {kwargs_key(each): each for each in ({}, *template_kwargs)}
    trained = [token for each in distinct.values() for token in end_token_ids(tokenizer, each)]
    ends = {*trained, *(token for token in listed if token is not None)}
    if not ends:
        raise ModelError(
            "the tokenizer has no end token",
            code="tokenizer.no-end-token",
            why="responses would never end",
            fix="set eos_token in the tokenizer's files",
        )
    return sorted(ends)


def _generation_config(
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    max_new_tokens: int,
) -> GenerationConfig:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
        use_cache=True,
        do_sample=False,  # the logits processors draw, see `drawing`
    )


def check_room(
    config: Any, lengths: Iterable[int], max_new_tokens: int, *, where: str = "generate"
) -> None:
    """Raise RecipeError if a prompt and its response exceed the context length of the model.

    Args:
        lengths: tokens of each prompt.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(lengths, default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise RecipeError(
            f"the longest prompt has {longest} tokens, which with max_new_tokens {max_new_tokens} "
            f"exceeds the model's context of {limit}",
            code="model.context-exceeded",
            where=where,
            why="the model was not trained on positions beyond its context",
            fix="lower max_new_tokens, or remove the longest prompts",
        )


@contextmanager
def _generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Set evaluation mode and an empty generation config, and restore both afterwards."""
    from transformers import GenerationConfig

    modes = [(module, module.training) for module in model.modules()]
    # An adapter passes its generation config to the model it wraps.
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
