"""Test whether a step layout is exact for a model: compare results on a few random texts with plain forwards.

There are three tests.

* The result of a response must not depend on other texts. The other texts of the row are exchanged for
others of the same lengths, and the result must be bitwise equal, for any dtype and weights. If it is not,
but the difference may be rounding (the batch size of an expert depends on the routing), the gradient of the
result with respect to all other texts must be exactly zero; with engines that manage gradients themselves
(ZeRO-3), the order of the other texts must not matter.
* The result must equal that of the model's own forward, up to the rounding of this model, which is measured
by perturbing the last bit of its modules' outputs.
* The gradients with respect to the embeddings must equal those of plain forwards, with a similar tolerance.

Shapes: `R` responses, `n` values, `P` positions: the tokens of all prompts and responses, each once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rpo_trainer.models.sharding import device_of, has_shards, num_rows
from rpo_trainer.models.unwrap import is_classifier, transformers_model
from rpo_trainer.step.batch import Layout
from rpo_trainer.step.forward import response_scores, token_logprobs
from rpo_trainer.step.packing import pack

Example = dict[str, Any]
# Lengths of each prompt and of its responses.
_LENGTHS = ((5, (4, 3)), (3, (2, 3)))


@dataclass
class Answers:
    """Results of a model for some examples.

    Attributes:
        values: `[n]`, log-probs of response tokens in order, or scores.
        owner: `[n]`, the response of each value.
        gradients: `[P, H]`, gradient of a weighted sum of the values with respect to the embeddings, summed
            over the responses for prompts; None if not available.
        dtype: dtype of the embeddings' output, which an engine may change.
    """

    values: Tensor
    owner: Tensor
    gradients: Tensor | None
    dtype: torch.dtype | None = None


# --- the texts ---


def random_examples(model: nn.Module, seed: int = 0) -> list[Example]:
    """Return two random prompts with two responses each, without special tokens of the model's config."""
    inner = transformers_model(model)
    rows = num_rows(inner.get_input_embeddings().weight)
    known = getattr(inner.config.get_text_config(), "vocab_size", None) or rows
    special = set(_special_tokens(inner.config.to_dict()))
    tokens_of = range(min(rows, known))
    usable = [t for t in tokens_of if t not in special] or list(tokens_of)
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        places = torch.randint(len(usable), (n,), generator=generator, device="cpu")
        return [usable[place] for place in places.tolist()]

    return [
        {
            "prompt_ids": tokens(prompt),
            "response_ids": [tokens(n) for n in lengths],
            "response_mask": [[1] * n for n in lengths],
        }
        for prompt, lengths in _LENGTHS
    ]


def _special_tokens(settings: Mapping[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _special_tokens(value)
        elif "token" in str(name):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (v for v in values if isinstance(v, int) and not isinstance(v, bool))


def exchanges(
    examples: Sequence[Example], others: Sequence[Example]
) -> Iterator[tuple[list[Example], list[int]]]:
    """Yield the examples with some texts replaced by those of `others`, and the indices of kept responses."""
    counts = [len(example["response_ids"]) for example in examples]
    first = [sum(counts[:i]) for i in range(len(counts))]
    for kept in range(len(examples)):  # one entire example is kept
        yield (
            [e if i == kept else others[i] for i, e in enumerate(examples)],
            list(range(first[kept], first[kept] + counts[kept])),
        )
    for parity in (0, 1):  # every second response is kept
        changed = []
        for example, other in zip(examples, others, strict=True):
            responses = [
                own if k % 2 == parity else theirs
                for k, (own, theirs) in enumerate(
                    zip(example["response_ids"], other["response_ids"], strict=True)
                )
            ]
            changed.append({**example, "response_ids": responses})
        yield (
            changed,
            [
                first[i] + k
                for i, count in enumerate(counts)
                for k in range(count)
                if k % 2 == parity
            ],
        )


# --- results ---


def plain_answers(model: nn.Module, examples: Sequence[Example]) -> Answers:
    """Compute the results with one plain forward for each response."""
    device, scored = device_of(model), is_classifier(model)
    values, owners = [], []
    with torch.enable_grad(), _embedded(model) as embedded:
        for prompt, response in _texts(examples):
            ids = torch.tensor([prompt + response], device=device)
            logits = model(input_ids=ids, use_cache=False).logits
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if scored:
                values.append(logits[0])
            else:
                chosen = torch.tensor(response, device=device)[:, None]
                logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                values.append(logps.gather(1, chosen)[:, 0])
            owners += [len(values) - 1] * len(values[-1])
        flat = torch.cat(values)
        grads = _gradients(model, flat, embedded, len(values))
    gradients = None
    if grads is not None:
        rows = [grad[0] for grad in grads]
        ends = [len(prompt) for prompt, _ in _texts(examples)]
        places = [(row[:end], row[end:]) for row, end in zip(rows, ends, strict=True)]
        gradients = _by_place(examples, places)
    dtype = embedded[0].dtype if embedded else None
    return Answers(flat.detach(), torch.tensor(owners), gradients, dtype)


def layout_answers(
    model: nn.Module,
    examples: Sequence[Example],
    layout: Layout,
    *,
    pad_token_id: int,
    with_gradients: bool = False,
) -> Answers:
    """Compute the results with one packed micro-batch, on a model with `forward.install` applied."""
    with torch.set_grad_enabled(with_gradients), _embedded(model) as embedded:
        values, owner = _run(model, examples, layout, pad_token_id)
        gradients = None
        if with_gradients and layout != "single":
            grads = _gradients(model, values, embedded, 1)
            if grads is not None:
                places = [
                    (grads[0].flatten(0, 1)[prompt], grads[0].flatten(0, 1)[response])
                    for prompt, response in _places(examples, layout)
                ]
                gradients = _by_place(examples, places, once=layout == "shared")
    return Answers(values.detach(), owner, gradients)


def sees_others(
    model: nn.Module, examples: Sequence[Example], layout: Layout, *, pad_token_id: int
) -> bool | None:
    """Whether the gradient of any response's values with respect to other texts is nonzero.

    Returns:
        None if gradients are not available.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return None  # DeepSpeed runs the backward itself
    with torch.enable_grad(), _embedded(model) as embedded:
        values, owner = _run(model, examples, layout, pad_token_id)
        if len(embedded) != 1:
            return None
        owner = owner.to(values.device)
        for number, (prompt, response) in enumerate(_places(examples, layout)):
            total = values[owner == number].sum()
            grad: Tensor | None = torch.autograd.grad(
                total, embedded, retain_graph=True, allow_unused=True
            )[0]
            if grad is None:
                return None
            others = torch.ones(grad.shape[0] * grad.shape[1], dtype=torch.bool)
            others[prompt] = others[response] = False
            if grad.flatten(0, 1)[others.to(grad.device)].ne(0).any():
                return True
    return False


def sees_order(
    model: nn.Module,
    examples: Sequence[Example],
    others: Sequence[Example],
    layout: Layout,
    *,
    pad_token_id: int,
) -> bool:
    """Whether the values of an example depend on the order of two others, before or after it.

    The batch size of each expert stays the same, so that rounding is bitwise equal.

    Args:
        others: examples with the same lengths as `examples`.
    """
    for number, kept in enumerate(examples):
        one, two = examples[1 - number], others[1 - number]
        for rows in (([kept, one, two], [kept, two, one]), ([one, two, kept], [two, one, kept])):
            found = []
            for row in rows:
                answers = layout_answers(model, row, layout, pad_token_id=pad_token_id)
                first = 0 if row[0] is kept else sum(len(e["response_ids"]) for e in row[:2])
                own = (answers.owner >= first) & (answers.owner < first + len(kept["response_ids"]))
                found.append(answers.values[own])
            if not torch.equal(*found):
                return True
    return False


@contextmanager
def last_bits_perturbed(model: nn.Module) -> Iterator[None]:
    """Perturb the outputs of all innermost modules by the resolution of their dtype, up or down."""
    generator = torch.Generator().manual_seed(0)

    def perturb(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        # The caller's default device may differ from that of the generator.
        signs = torch.randint(
            2, output.shape, generator=generator, dtype=torch.int8, device="cpu"
        ).to(output.device, output.dtype)
        return output * (1 + torch.finfo(output.dtype).eps * (2 * signs - 1))

    handles = [
        module.register_forward_hook(perturb)
        for module in model.modules()
        if not any(True for _ in module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- embeddings and their gradients ---


@contextmanager
def _embedded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of the model's embedding, with gradients enabled."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output.detach().requires_grad_(True)
        found.append(output)
        return output.clone()  # some models modify it in place

    handle = transformers_model(model).get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _gradients(
    model: nn.Module, values: Tensor, embedded: Sequence[Tensor], forwards: int
) -> list[Tensor] | None:
    if has_shards(model) or len(embedded) != forwards:
        return None  # an engine manages the gradients itself
    weights = torch.linspace(-1.0, 1.0, values.numel(), device=values.device, dtype=values.dtype)
    grads = torch.autograd.grad((values * weights).sum(), embedded, allow_unused=True)
    return None if any(grad is None for grad in grads) else list(grads)


def _by_place(
    examples: Sequence[Example], places: Sequence[tuple[Tensor, Tensor]], *, once: bool = False
) -> Tensor:
    """Combine the gradients of prompt and response of each response to `[P, H]`.

    Args:
        once: the gradient of a prompt is already summed over its responses.
    """
    pieces, number = [], 0
    for example in examples:
        own = places[number : number + len(example["response_ids"])]
        prompts = [prompt.float() for prompt, _ in own]
        pieces.append(prompts[0] if once else torch.stack(prompts).sum(0))
        pieces += [response.float() for _, response in own]
        number += len(own)
    return torch.cat(pieces)


def _places(examples: Sequence[Example], layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """Return flat indices of the prompt and the text of each response in the rows of a layout."""
    longest = max(len(prompt) + len(response) for prompt, response in _texts(examples))
    found, start = [], 0
    for example in examples:
        for k, response in enumerate(example["response_ids"]):
            length = len(example["prompt_ids"])
            if k == 0 or layout != "shared":
                prompt = torch.arange(start, start + length)
                start += length
            found.append((prompt, torch.arange(start, start + len(response))))
            start += len(response)
            if layout == "padded":
                start = len(found) * longest
    return found


def _texts(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    return [(e["prompt_ids"], response) for e in examples for response in e["response_ids"]]


def _run(
    model: nn.Module, examples: Sequence[Example], layout: Layout, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Run one packed micro-batch; return its values and their owners, both `[n]`."""
    batch = pack(examples, layout, pad_token_id=pad_token_id)
    inputs = batch.model_inputs.to(device_of(model))
    if not is_classifier(model):
        return token_logprobs(model, inputs), batch.response_index
    scores = response_scores(model, inputs)  # [R, A]
    return scores.flatten(), torch.arange(len(scores)).repeat_interleave(scores.shape[1])
