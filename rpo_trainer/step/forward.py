"""Forward of a packed micro-batch: log-probs of trained tokens, or scores of responses.

A causal language model returns the log-prob of each trained token, a sequence classifier the scores of each
response.

`install(model)` adds the call `model(packed=inputs)` to a transformers model. It runs inside the model's own
`forward`, so that wrappers (DDP, FSDP, DeepSpeed, PEFT) see a regular call, and their hooks gather the
weights where they are used, including those of the head.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from rpo_trainer.errors import first_line
from rpo_trainer.models.multimodal import decoder_of
from rpo_trainer.models.sharding import device_of, has_shards, num_rows
from rpo_trainer.models.unwrap import is_classifier, transformers_model
from rpo_trainer.runtime import distributed
from rpo_trainer.step.attention import (
    ATTENTION_NAME,
    REACH_ATTRIBUTE,
    in_autocast_dtype,
    packing_masks,
)
from rpo_trainer.step.attention_reach import Recording, recording
from rpo_trainer.step.batch import AttentionPlan, Layout, ModelInputs, Segment
from rpo_trainer.step.head import FORWARD_ERRORS, Head, forward_of, head_of
from rpo_trainer.step.logprobs import linear_logprobs, logprobs_from_logits
from rpo_trainer.step.router_loss import only_sums, requested, split_sums, sums_of, with_sums
from rpo_trainer.step.token_stats import TokenStats

_RECORDED_TOKENS = 8  # tokens of the forward that records the attention masks


def install(
    model: nn.Module, *, layout: Layout = "shared", head: Head | None = None, learn: bool = True
) -> Recording:
    """Add the call `model(packed=inputs)` to a model. Installing again changes the settings.

    Args:
        model: a causal language model or a sequence classifier, wrapped or not.
        layout: step layout. Layouts padded and single do not change the model's attention.
        head: how logits are computed; None determines it from the model.
        learn: run the model to determine its head and the reach of its attention. If False, for a model on
            the meta device, the head is a plain product, and the reach is that of the arguments of each
            call.

    Returns:
        Arguments of the attention modules in a forward of the model; empty for layouts padded and single, and
        without `learn`.
    """
    inner = transformers_model(model)
    uninstall(inner)
    inner._rpo_stock = (inner.forward, inner.config._attn_implementation)
    inner._rpo_plan_as_mask = False
    decoder = decoder_of(inner)
    inner._rpo_decoder = next(name for name, part in inner.named_modules() if part is decoder)
    run = _packed_scores if is_classifier(inner) else _packed_logprobs

    @functools.wraps(inner.forward)
    def forward(self: Any, *args: Any, packed: Any = None, **kwargs: Any) -> Any:
        if packed is None:
            return self._rpo_stock[0](*args, **kwargs)
        return packed(self) if callable(packed) else run(self, packed)

    # Bound method, so that a deep copy of the model uses its own weights.
    inner.forward = types.MethodType(forward, inner)
    if head is None:
        ask = learn and not is_classifier(inner)
        plain = Head(fused=not is_classifier(inner) or hasattr(inner, "score"))
        head = _within(model, lambda m: head_of(m, m._rpo_stock[0])) if ask else plain
    inner._rpo_head = head
    if layout in ("padded", "single"):
        return Recording()
    inner.set_attn_implementation(ATTENTION_NAME)
    return _learn_reach(model) if learn else Recording()


def _within(model: nn.Module, question: Callable[[Any], Any]) -> Any:
    """Evaluate `question(inner)` inside the forward of the model's wrappers, in eval mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(packed=question)
    finally:
        model.train(training)


def uninstall(model: nn.Module) -> None:
    """Restore the model's own forward and attention."""
    inner = transformers_model(model)
    if not hasattr(inner, "_rpo_stock"):
        return
    forward, attention = inner._rpo_stock
    inner.forward = forward
    if inner.config._attn_implementation != attention:
        inner.set_attn_implementation(attention)
    for module in inner.modules():
        if REACH_ATTRIBUTE in vars(module):
            delattr(module, REACH_ATTRIBUTE)
    for name in ("_rpo_stock", "_rpo_decoder", "_rpo_plan_as_mask", "_rpo_head"):
        if name in vars(inner):
            delattr(inner, name)


def _learn_reach(model: nn.Module) -> Recording:
    """Run a forward of a few tokens, and store the reach of its mask on each attention module."""
    inner = transformers_model(model)
    rows = num_rows(inner.get_input_embeddings().weight)
    ids = torch.arange(_RECORDED_TOKENS, device=device_of(model))[None] % rows
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "packing_plan": AttentionPlan((Segment(0, _RECORDED_TOKENS),)),
        "use_cache": False,
    }
    with recording(ATTENTION_NAME) as found:
        try:
            _within(model, lambda m: _decoder(m)(**arguments))
        except FORWARD_ERRORS as error:
            found.problems.append(f"{type(error).__name__}: {first_line(error)}")
    for module, reach in found.reaches.items():
        setattr(module, REACH_ATTRIBUTE, reach)
    inner._rpo_plan_as_mask = bool(found.unplanned)
    return found


def _decoder(inner: Any) -> Any:
    """Return `decoder_of` an installed model by its stored name, without searching all modules."""
    return inner.get_submodule(inner._rpo_decoder)


def token_logprobs(model: nn.Module, model_inputs: ModelInputs) -> Tensor:
    """Compute log π of each trained token of a micro-batch (`packing.pack`): `[N]`, at least float32."""
    return split_sums(model(packed=model_inputs), model_inputs)


def response_scores(model: nn.Module, model_inputs: ModelInputs) -> Tensor:
    """Compute scores of a sequence classifier at each response's last token: `[R, A]`, at least float32."""
    return split_sums(model(packed=model_inputs), model_inputs)


def router_sums_only(model: nn.Module, model_inputs: ModelInputs) -> Tensor:
    """Compute the router sums, `[2E + 1]`, for inputs with `router_loss.request(..., only=True)`."""
    return model(packed=model_inputs)  # type: ignore[no-any-return]


def _decoder_inputs(inputs: ModelInputs) -> dict[str, Any]:
    """Return the arguments of the decoder. For padded rows the model computes the positions."""
    decoder_inputs = {"input_ids": inputs.input_ids, "use_cache": False}
    if inputs.plan is not None:
        decoder_inputs |= {"position_ids": inputs.position_ids, "packing_plan": inputs.plan}
    else:
        decoder_inputs["attention_mask"] = inputs.attention_mask
    if requested(inputs):
        decoder_inputs["output_router_logits"] = True
    return decoder_inputs


class _Outputs(NamedTuple):
    """Outputs of a forward: the requested tensor, `[rows · length, ·]`, and router logits of each layer."""

    wanted: Tensor
    router_logits: Sequence[Tensor]


def _run(model: Any, forward: Any, inputs: ModelInputs, wanted: str) -> _Outputs:
    """Run one forward, or one for each of `rows` in layout single."""
    decoder_inputs = _decoder_inputs(inputs)
    rows = inputs.rows
    if rows is None:
        plan = inputs.plan
        masks = packing_masks(plan if model._rpo_plan_as_mask else None)
        with masks if plan is not None else contextlib.nullcontext():
            found = forward(**decoder_inputs)
        return _Outputs(_flat(getattr(found, wanted)), getattr(found, "router_logits", None) or ())
    # Ranks with sharded weights must run the same number of forwards.
    rounds = distributed.all_reduce_max(len(rows)) if has_shards(model) else len(rows)
    pieces, routers = [], []
    for number in range(rounds):
        start, stop = rows[number % len(rows)]
        found = forward(**{**decoder_inputs, "input_ids": inputs.input_ids[:, start:stop]})
        pieces.append(_flat(getattr(found, wanted)))
        routers.append([_flat(layer) for layer in getattr(found, "router_logits", None) or ()])
    unused = sum((piece.sum() * 0.0 for piece in pieces[len(rows) :]), pieces[0].new_zeros(()))
    return _Outputs(
        torch.cat(pieces[: len(rows)]) + unused,
        [torch.cat(layer) for layer in zip(*routers[: len(rows)], strict=True)],
    )


def _packed_scores(model: Any, inputs: ModelInputs) -> Any:
    if not model._rpo_head.fused:
        if inputs.plan is not None:
            raise ValueError("the model's own forward scores one response per row")
        outputs = _run(model, model._rpo_stock[0], inputs, "logits")
        scores: Tensor = outputs.wanted
        return with_sums(_at_least_float32(scores), outputs, inputs)
    outputs = _run(model, _decoder(model), inputs, "last_hidden_state")
    if only_sums(inputs):
        return sums_of(outputs, inputs)
    last = outputs.wanted.index_select(0, inputs.last_index)
    # Without autocast: a score of 3.3 in bfloat16 would have an error of 0.01.
    with torch.autocast(last.device.type, enabled=False):
        scores = model.score(last.to(next(model.score.parameters()).dtype))
    return with_sums(_at_least_float32(scores), outputs, inputs)


def _packed_logprobs(model: Any, inputs: ModelInputs) -> Any:
    head: Head = model._rpo_head
    run, wanted = (
        (_decoder(model), "last_hidden_state") if head.fused else (model._rpo_stock[0], "logits")
    )
    outputs = _run(model, run, inputs, wanted)
    if only_sums(inputs):
        return sums_of(outputs, inputs)
    gathered = outputs.wanted.index_select(0, inputs.predict_index)
    if head.fused:
        logps = _run_head(model, gathered, inputs.labels, head, inputs.stats)
    else:  # all logits of the model's own forward
        logps = logprobs_from_logits(gathered, inputs.labels)
        if inputs.stats is not None:
            inputs.stats.set_from_logits(gathered, inputs.labels)
    return with_sums(logps, outputs, inputs)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _run_head(
    model: Any, hidden: Tensor, labels: Tensor, head: Head, stats: TokenStats | None
) -> Tensor:
    """Call the head as a module whose forward is replaced by the fused log-probs, so that its hooks run."""
    module: Any = model.get_output_embeddings()
    if head.hidden_multiplier != 1.0:
        hidden = hidden * head.hidden_multiplier
    if type(module) is not nn.Linear:
        return _generic_head(module, hidden, labels, head, stats)

    def fused(x: Tensor) -> Tensor:
        return linear_logprobs(
            in_autocast_dtype(x),
            module.weight,
            labels,
            module.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            logits_chunk_bytes=head.logits_chunk_bytes,
            stats=stats,
        )

    with forward_of(module, fused):
        return module(hidden)  # type: ignore[no-any-return]


def _generic_head(
    module: nn.Module, hidden: Tensor, labels: Tensor, head: Head, stats: TokenStats | None
) -> Tensor:
    """Compute log-probs with a head that is not a plain linear layer (LoRA, quantized).

    Its own forward runs in chunks, which are recomputed in the backward.
    """

    def chunk(h: Tensor, y: Tensor, own: TokenStats | None) -> Tensor:
        logits = module(h) * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        if own is not None and own.entropy is None:  # not again when it is recomputed
            own.set_from_logits(logits, y)
        return logprobs_from_logits(logits, y)

    vocabulary = getattr(module, "out_features", None) or 2**17
    size = max(1, head.logits_chunk_bytes // (4 * vocabulary))
    parts = list(zip(torch.split(hidden, size), torch.split(labels, size), strict=True))
    of_parts = [None if stats is None else TokenStats(stats.with_mean) for _ in parts]
    pieces = [
        torch.utils.checkpoint.checkpoint(chunk, h, y, own, use_reentrant=False)
        for (h, y), own in zip(parts, of_parts, strict=True)
    ]
    if stats is not None:
        stats.set_joined([own for own in of_parts if own is not None])
    return torch.cat(pieces)
