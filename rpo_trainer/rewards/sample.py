"""Responses sampled from a policy with transformers' own `generate`.

Each response has random numbers of its own, one for every token, that follow from the seed, the
prompt's key and the response's number alone: what else is in the batch, and where a run was
interrupted, does not matter. (It does to the last bit of the logits, on hardware whose sums depend
on the shape of a batch: a number would have to fall into that bit to give another token.)

What a checkpoint says about decoding (a temperature, a repetition penalty, a top-k) is set aside:
the responses come from the policy itself, as the caller's arguments shape it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from rpo_trainer.data import encode_prompt, end_token_ids
from rpo_trainer.data.rows import RowError
from rpo_trainer.errors import DataError, ModelError, RecipeError
from rpo_trainer.recipe.template_kwargs import kwargs_key
from rpo_trainer.rewards.drawing import Drawing
from rpo_trainer.rewards.sampled_text import PromptTokens, ResponseReader, Sample
from rpo_trainer.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[dict[str, Any]]
Tools = Sequence[list[dict[str, Any]] | None]  # of each prompt
TemplateKwargs = Sequence[Mapping[str, Any]]  # of each prompt


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
    ranks: Ranks = ALONE,
) -> list[list[Sample]]:
    """K sampled responses for each prompt, in the prompts' order; arguments as `iter_responses`.

    Args:
        ranks: the processes that share the work; all of them call this, and get all responses.
    """
    found = ranks.all_gather_dict(
        dict(
            iter_responses(
                model, tokenizer, prompts, range(len(prompts)), responses=responses,
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                batch_size=batch_size, seed=seed, keys=keys, tools=tools, parsed=parsed,
                template_kwargs=template_kwargs, shard=(ranks.rank(), ranks.world_size()),
            )
        )
    )  # fmt: skip
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
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, list[Sample]]]:
    """(index of a wanted prompt, its K sampled responses), a batch at a time.

    The same seed and keys give the same responses, whatever the state of the global generators,
    which are not used. The model's mode and its configs are left as they were.

    Args:
        prompts: texts, or lists of messages for the tokenizer's chat template.
        wanted: indices of the prompts to sample for. Batches are those of all prompts: a run that
            resumes computes with the shapes, and so the rounding, of one that was never stopped.
        responses: K, at least 1.
        max_new_tokens: limit of a response, its end token included.
        temperature: above 0; 1 samples from the policy as it is.
        top_p: the smallest set of tokens with this probability in all; 1 is every token.
        top_k: the k likeliest tokens; 0 is every token.
        batch_size: responses decoded at once; a prompt's K are never parted.
        keys: names the random numbers of each prompt; None: its index. Prompts with one key get the
            same numbers.
        tools: function descriptions of each prompt, for the chat template.
        parsed: whether text of special tokens in each prompt stands for the tokens.
        template_kwargs: variables of the chat template for each prompt.
        shard: (rank, world size): which of the batches this process decodes.

    Raises:
        RecipeError: an argument out of its range, or longer than the model's context.
        ModelError: no end token.
        DataError: a prompt without a token, messages that the chat template refuses, or without one.
    """
    if not temperature > 0 or not 0 < top_p <= 1 or top_k < 0 or responses < 1:
        raise RecipeError(
            f"cannot sample {responses} responses with temperature {temperature}, "
            f"top_p {top_p} and top_k {top_k}",
            code="recipe.out-of-range",
            where="generate",
            why="logits are divided by the temperature, and at least one token must be left to draw",
            fix="responses >= 1, temperature > 0, 0 < top_p <= 1, top_k >= 0",
        )
    names = keys if keys is not None else [str(index) for index in range(len(prompts))]
    drawing = Drawing(names, seed, max_new_tokens, temperature, top_p, top_k)
    yield from _generate(
        model, tokenizer, prompts, wanted, drawing, responses, max_new_tokens, batch_size, tools,
        parsed, template_kwargs, shard,
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
    ranks: Ranks = ALONE,
) -> list[Sample]:
    """The likeliest next token at every step: one response a prompt; else as `sample_responses`."""
    own = _generate(
        model, tokenizer, prompts, range(len(prompts)), None, 1, max_new_tokens, batch_size,
        tools, parsed, template_kwargs, (ranks.rank(), ranks.world_size()),
    )  # fmt: skip
    found = ranks.all_gather_dict(dict(own))
    return [found[index][0] for index in range(len(prompts))]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    wanted: Collection[int],
    drawing: Drawing | None,
    copies: int,
    max_new_tokens: int,
    batch_size: int,
    tools: Tools | None,
    parsed: Sequence[bool] | None,
    template_kwargs: TemplateKwargs | None,
    shard: tuple[int, int],
) -> Iterator[tuple[int, list[Sample]]]:
    """Batches of prompts of like length, longest first: memory runs out at once or never.

    Args:
        drawing: None: the likeliest token each time.
        copies: responses for each prompt.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise RecipeError(
            f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}",
            code="recipe.out-of-range",
            where="generate",
            why="a response has at least its end token, and a batch at least one prompt",
            fix="give at least 1 for both",
        )
    asked = [
        _prompt_tokens(
            tokenizer,
            prompt,
            tools[index] if tools is not None else None,
            index,
            parsed=parsed is not None and parsed[index],
            template_kwargs=template_kwargs[index] if template_kwargs is not None else None,
        )
        for index, prompt in enumerate(prompts)
    ]
    encoded = [each.ids for each in asked]
    check_room(model.config, encoded, max_new_tokens)
    ends = _end_tokens(model, tokenizer, template_kwargs or ())
    config = _generation_config(tokenizer, ends, max_new_tokens)
    prompts_per_batch, left = max(1, batch_size // copies), set(wanted)
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    device, reader = next(model.parameters()).device, ResponseReader(tokenizer, ends)
    rank, world = shard
    batches = [
        order[start : start + prompts_per_batch]
        for start in range(0, len(order), prompts_per_batch)
    ]
    for batch in batches[rank::world]:
        if left.isdisjoint(batch):
            continue
        width = len(encoded[batch[0]])
        repeated = [encoded[index] for index in batch for _ in range(copies)]
        with _generation_mode(model):
            choice = [] if drawing is None else drawing.processors(batch, copies, width)
            rows = _generate_batch(model, repeated, config, choice, device)
        for place, index in enumerate(batch):
            if index in left:
                own = rows[place * copies : (place + 1) * copies]
                yield index, [reader.read(asked[index], row) for row in own]
    reader.warn()


def _generate_batch(
    model: PreTrainedModel,
    encoded: list[list[int]],
    config: GenerationConfig,
    choice: list[LogitsProcessor],
    device: torch.device,
) -> list[list[int]]:
    """The new tokens after each of the encoded prompts."""
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
            logits_processor=LogitsProcessorList(choice),
            synced_gpus=False,  # each process has the whole model, and batches of its own
        )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    tools: list[dict[str, Any]] | None,
    index: int,
    *,
    parsed: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> PromptTokens:
    try:
        ids = encode_prompt(
            tokenizer, prompt, tools, parsed=parsed, template_kwargs=template_kwargs
        )
    except RowError as error:
        raise DataError(
            str(error),
            code=error.code,
            where=f"prompt {index}",
            why="no response can be sampled to it",
            fix="fix the row, or give the tokenizer another chat template",
        ) from error
    if not ids:
        raise DataError(
            "the prompt has no token",
            code="data.empty-prompt",
            where=f"prompt {index}",
            why="the first token of a response is drawn from what the model predicts after the prompt",
            fix="leave the row out, or give its prompt some text",
        )
    given = prompt if isinstance(prompt, str) else list(prompt)
    return PromptTokens(given, ids, tools, parsed, template_kwargs)


def _end_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Iterable[Mapping[str, Any]],
) -> list[int]:
    """What ends a response in training, and the end tokens of the checkpoint, often several."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    listed = named if isinstance(named, list) else [named]
    # One short rendering for each set of variables: they may change what ends a turn.
    distinct = {kwargs_key(each): each for each in ({}, *template_kwargs)}
    trained = [token for each in distinct.values() for token in end_token_ids(tokenizer, each)]
    ends = {*trained, *(token for token in listed if token is not None)}
    if not ends:
        raise ModelError(
            "the tokenizer has no end token",
            code="tokenizer.no-end-token",
            why="a response would never end",
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
        do_sample=False,  # the draw is in the logits processors, see `drawing`
    )


def check_room(
    config: Any, encoded: Sequence[Sequence[int]], max_new_tokens: int, *, where: str = "generate"
) -> None:
    """RecipeError where a prompt and its response are longer than a model of `config` has positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, encoded), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise RecipeError(
            f"the longest prompt has {longest} tokens, and with max_new_tokens {max_new_tokens} "
            f"goes beyond the model's context of {limit}",
            code="model.context-exceeded",
            where=where,
            why="the model was not trained on positions beyond it, and its output there is noise",
            fix="lower max_new_tokens, or leave the longest prompts out",
        )


@contextmanager
def _generation_mode(model: PreTrainedModel) -> Iterator[None]:
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
