"""Select the step layout and the head for a model at the start of training: the fastest that is exact.

Shared prompts, packed rows and the fused head are exact for many model families, and wrong for others:
state-space layers that carry state from one text to the next, other kinds of attention, additional operations
in the head. So each trainer tests the given model once (`layout_proof`), and uses the first layout that
passes.

The test runs in the dtype of the weights, usually float32, where differences are most visible. On a GPU
autocast selects other kernels, so there the layout is also tested under the autocast of the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rpo_trainer.errors import ModelError, first_line
from rpo_trainer.models.adapters import lowest_precision
from rpo_trainer.models.sharding import device_of, has_shards
from rpo_trainer.models.unwrap import is_classifier, transformers_model
from rpo_trainer.runtime.distributed import all_reduce_max_float, broadcast, is_main
from rpo_trainer.runtime.file_errors import device_failed
from rpo_trainer.step.attention_reach import Recording, rotary_limit
from rpo_trainer.step.batch import Layout
from rpo_trainer.step.forward import install, uninstall
from rpo_trainer.step.head import FORWARD_ERRORS, Head
from rpo_trainer.step.layout_proof import (
    Answers,
    exchanges,
    last_bits_perturbed,
    layout_answers,
    plain_answers,
    random_examples,
    sees_order,
    sees_others,
)

logger = logging.getLogger(__name__)

_LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded", "single")
_NAMES = {
    "shared": "shared prompts",
    "packed": "packed rows",
    "padded": "one response per row",
    "single": "one response per forward",
}
_OWN_LOGITS = "the model's own logits"
_DEPENDS = "a response depends on the other texts of its batch"


def probe(
    model: nn.Module,
    *,
    layout: Layout | None = None,
    logits_chunk_bytes: int | None = None,
    longest: int | None = None,
    autocast: torch.dtype | None = None,
    whose: str = "the model",
) -> tuple[Layout, Head]:
    """Install the fastest step layout whose results equal those of plain forwards, and log it.

    With sharded weights all ranks must call this together, and make the same choice.

    Args:
        model: a causal language model or a sequence classifier, wrapped or not.
        layout: the only layout to try; None tries shared, packed, padded and single, in this order.
        logits_chunk_bytes: size of the head's tiles; None for the default.
        longest: number of tokens of the longest text, or None if unknown. Some rotary embeddings depend on
            it.
        autocast: dtype of the training's autocast, or None.
        whose: name of the model in messages.

    Raises:
        ModelError: no layout passes, or the model's own forward fails.
    """
    shared = has_shards(model)  # before a forward, after which a few weights stay gathered
    training = model.training
    model.eval()
    name = type(transformers_model(model)).__name__
    try:
        recorded = install(model)
        head: Head = transformers_model(model)._rpo_head
        uninstall(model)
        if logits_chunk_bytes is not None:
            head.logits_chunk_bytes = logits_chunk_bytes
        with _exact_products():
            proofs = [_Proof(model, shared)]
            if autocast is not None and not shared and _has_own_kernels(device_of(model)):
                proofs.append(_Proof(model, shared, autocast))
        against = _known_against(model, recorded, longest)
        refused: list[str] = []
        for candidate in (layout,) if layout else _LAYOUTS:
            if against[candidate]:
                refused.append(f"{_NAMES[candidate]}: {against[candidate][0]}")
                continue
            for tried in _heads(head):
                with _exact_products():
                    whys = (proof.refusal(candidate, tried) for proof in proofs)
                    why = next((one for one in whys if one is not None), None)
                if why is None:
                    _report(refused, candidate, tried, whose)
                    return candidate, tried
                own = "" if tried.fused else f" with {_OWN_LOGITS}"
                refused.append(f"{_NAMES[candidate]}{own}: {why}")
                if why.startswith(_DEPENDS):  # regardless of the head
                    break
    finally:
        model.train(training)
    uninstall(model)
    if layout:
        raise ModelError(
            f"layout={layout!r} does not reproduce plain forwards of {whose} ({name})",
            code="training.inexact-layout",
            why="; ".join(refused),
            fix="use layout='auto', which selects an exact one",
        )
    raise ModelError(
        f"no step layout reproduces plain forwards of {whose} ({name})",
        code="model.no-exact-layout",
        why="; ".join(refused),
        fix="load the model with attn_implementation='sdpa', or report the model type",
    )


def probe_on_all_ranks(model: nn.Module, **settings: Any) -> tuple[Layout, Head]:
    """Run `probe` on every rank, and use the result of rank 0 on all of them."""
    found = probe(model, **settings)
    layout, head = broadcast(found)
    if (layout, head) != found:
        install(model, layout=layout, head=head)
    return layout, head


def _known_against(
    model: nn.Module, recorded: Recording, longest: int | None
) -> dict[Layout, list[str]]:
    """Return reasons against each layout that are known without a test."""
    rotary = rotary_limit(model)
    others, alone = [], []
    if rotary is not None and (longest is None or longest > rotary.positions):
        others.append(
            f"its rotary embedding ({rotary.kind}) changes for all texts of a batch with a text longer than "
            f"{rotary.positions} tokens"
        )
        if rotary.remembers and longest is not None:
            alone.append(
                f"its rotary embedding ({rotary.kind}) changes permanently with a text longer than "
                f"{rotary.positions} tokens, and the longest text of the data has {longest}"
            )
    return {
        "shared": [*recorded.problems, *others],
        "packed": [*recorded.problems, *others],
        # The number of selected padding tokens depends on the length.
        "padded": [*recorded.selecting, *others],
        "single": alone,
    }


def _heads(head: Head) -> list[Head]:
    return [head, dataclasses.replace(head, fused=False)] if head.fused else [head]


def _report(refused: list[str], layout: Layout, head: Head, whose: str) -> None:
    if not is_main():
        return
    how = "fused head" if head.fused else _OWN_LOGITS
    of = "" if whose == "the model" else f" of {whose}"
    line = f"step layout{of}: {_NAMES[layout]}, {how}"
    if refused:
        logger.warning("%s (%s)", line, "; ".join(refused))
    else:
        logger.info("%s", line)


def _has_own_kernels(device: torch.device) -> bool:
    """Whether 16-bit dtypes use other kernels than float32 on this device."""
    return device.type == "cuda"


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Disable TF32 for float32 products."""
    products: Any = torch.backends.cuda.matmul
    every: Any = torch.backends
    found = products.fp32_precision
    own = found if found != every.fp32_precision else "none"  # inherits the global setting
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = own


class _Proof:
    """Results of plain forwards of a model, against which layouts are tested.

    Args:
        autocast: dtype of the autocast for all forwards, or None.
    """

    def __init__(
        self, model: nn.Module, ranks_share_weights: bool, autocast: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.ranks_share_weights = ranks_share_weights
        self.autocast = autocast
        self.examples = random_examples(model)
        self.others = random_examples(model, seed=1)
        try:
            self.plain = self._plain()
        except FORWARD_ERRORS as error:
            if device_failed(error):
                raise
            raise ModelError(
                f"the forward pass of a {type(transformers_model(model)).__name__} fails",
                code="model.forward-fails",
                why=f"{type(error).__name__}: {first_line(error)}",
                fix="try another dtype (dtype=torch.float32) or another attn_implementation",
            ) from error
        dtype = min(
            (lowest_precision(model), self.plain.dtype or torch.float32), key=lambda d: d.itemsize
        )
        if autocast is not None:
            dtype = min(dtype, autocast, key=lambda d: d.itemsize)
        low = dtype in (torch.bfloat16, torch.float16)
        with last_bits_perturbed(model):
            disturbed = self._plain()
        size = 1.0 + self.plain.values.abs().max().item()
        if is_classifier(model):
            size -= 1.0  # the scores of a new head are small
        noise = _furthest(disturbed, self.plain)
        eps = torch.finfo(dtype).eps
        self.tolerance = 8.0 * noise + (4.0 if low else 32.0) * eps * size
        self.relative = 0.2 if low else 1e-3
        if autocast is not None:
            # Gradients of a deep model have larger rounding errors than its outputs.
            self.relative = max(self.relative, 2.0 * _relative(disturbed, self.plain))

    def refusal(self, layout: Layout, head: Head) -> str | None:
        """Return why the layout is not exact; None if it passes."""
        install(self.model, layout=layout, head=head)
        why = None
        try:
            why = self._dependence(layout) or self._disagreement(layout)
            if why is not None and self.autocast is not None:
                why += f" under autocast to {str(self.autocast).removeprefix('torch.')}"
        except FORWARD_ERRORS as error:
            if device_failed(error):
                raise
            why = f"{type(error).__name__}: {first_line(error)}"
        if self._agreed(why is not None) and why is None:
            return "it fails on another rank"
        return why

    def _agreed(self, value: float) -> float:
        """Return the maximum over the ranks that share the weights, so that they make the same choice."""
        return all_reduce_max_float(float(value)) if self.ranks_share_weights else float(value)

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device_of(self.model).type, self.autocast)

    def _plain(self) -> Answers:
        with self._arithmetic():
            return plain_answers(self.model, self.examples)

    def _disagreement(self, layout: Layout) -> str | None:
        found = self._ask(layout, with_gradients=True)
        off = _furthest(found, self.plain)
        if not off <= self.tolerance:
            return f"differs from plain forwards by {off:.2g} (tolerance {self.tolerance:.2g})"
        relative = _relative(found, self.plain)
        if not relative <= self.relative:
            return f"gradients differ from those of plain forwards by {relative:.1%}"
        return None

    def _dependence(self, layout: Layout) -> str | None:
        """Return whether a response's result depends on anything other than its own text, as a reason."""
        if layout == "single":
            return None
        base = self._ask(layout)
        off = 0.0
        for examples, kept in exchanges(self.examples, self.others):
            stays = torch.isin(base.owner, torch.tensor(kept))
            other = self._ask(layout, examples)
            if not torch.equal(base.values[stays], other.values[stays]):
                off = max(off, _furthest(base, other, stays))
        # A classifier's own forward finds the end of a row by its padding.
        if layout == "padded" and not is_classifier(self.model):
            filled = self._ask(layout, pad_token_id=self.others[0]["prompt_ids"][0])
            if not torch.equal(base.values, filled.values):
                off = max(off, _furthest(base, filled))
        if (off := self._agreed(off)) == 0.0:
            return None
        # It may be only rounding: the batch size of an expert depends on the routing.
        if off <= self.tolerance:
            pad = self.pad_token_id
            with self._arithmetic():
                seen = sees_others(self.model, self.examples, layout, pad_token_id=pad)
                if seen is None:
                    seen = sees_order(
                        self.model, self.examples, self.others, layout, pad_token_id=pad
                    )
            if not self._agreed(seen):
                return None
        return f"{_DEPENDS} (by {off:.2g})"

    @property
    def pad_token_id(self) -> int:
        config = transformers_model(self.model).config.get_text_config()
        return max(0, getattr(config, "pad_token_id", None) or 0)

    def _ask(
        self,
        layout: Layout,
        examples: list[dict[str, object]] | None = None,
        *,
        pad_token_id: int | None = None,
        with_gradients: bool = False,
    ) -> Answers:
        with self._arithmetic():
            return layout_answers(
                self.model,
                self.examples if examples is None else examples,
                layout,
                pad_token_id=self.pad_token_id if pad_token_id is None else pad_token_id,
                with_gradients=with_gradients,
            )


def _relative(found: Answers, expected: Answers) -> float:
    """Return the relative difference of the gradients; 0 without gradients."""
    if found.gradients is None or expected.gradients is None:
        return 0.0
    norm = expected.gradients.norm().clamp_min(1e-30)
    return float((found.gradients - expected.gradients).norm() / norm)


def _furthest(found: Answers, expected: Answers, where: torch.Tensor | None = None) -> float:
    """Return the largest absolute difference of the values; NaN counts as infinite."""
    off = (found.values - expected.values).abs()
    if where is not None:
        off = off[where]
    return float(torch.nan_to_num(off, nan=float("inf")).max())
