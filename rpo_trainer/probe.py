"""The start-up probe: which layout and which head give what the model itself gives, proved on this model.

Sharing a prompt, packing rows and fusing the head are exact for the families they were written for, and wrong
for others: state-space layers that carry one text into the next, attention of another kind, a head that does
more. So each trainer asks the model at hand, once, and takes the first layout that `proof.py` cannot refute.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import nn

from rpo_trainer.adapters import lowest_precision
from rpo_trainer.batch import Layout
from rpo_trainer.errors import ModelError, first_line
from rpo_trainer.foreign import device_failed
from rpo_trainer.heads import FORWARD_ERRORS, Head
from rpo_trainer.proof import (
    Answers,
    exchanges,
    last_bits_disturbed,
    layout_answers,
    plain_answers,
    random_examples,
    sees_others,
)
from rpo_trainer.reach import Recording
from rpo_trainer.step import causal_lm, install, is_classifier, uninstall

logger = logging.getLogger(__name__)

_LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded", "single")
_NAMES = {
    "shared": "shared prompts",
    "packed": "packed rows",
    "padded": "one response a row",
    "single": "one response a forward",
}
_DISAGREES = "disagrees"  # with plain forwards: its head may be the cause


def probe(
    model: nn.Module, *, layout: Layout | None = None, tile_bytes: int | None = None
) -> tuple[Layout, Head]:
    """Installs the fastest layout that is proved to give what plain forwards give, and says which.

    Args:
        model: a causal language model or a sequence classifier, wrapped or not, with whole weights.
        layout: the only one to try; None: shared, then packed, padded and single.
        tile_bytes: size of the head's tiles; None: the default.

    Raises:
        ModelError: no layout gives it, or the model's own forward fails.
    """
    training = model.training
    model.eval()
    try:
        recorded = install(model)
        head: Head = causal_lm(model)._rpo_head
        uninstall(model)
        if tile_bytes is not None:
            head.tile_bytes = tile_bytes
        proof = _Proof(model, recorded)
        refused: list[str] = []
        for candidate in (layout,) if layout else _LAYOUTS:
            for tried in _heads(head):
                why = proof.refusal(candidate, tried)
                if why is None:
                    _report(refused, candidate, tried)
                    return candidate, tried
                own = "" if tried.fused else " with the model's own logits"
                refused.append(f"{_NAMES[candidate]}{own}: {why}")
                if _DISAGREES not in why:
                    break
    finally:
        model.train(training)
    uninstall(model)
    raise ModelError(
        f"no layout of the step gives what plain forwards of {type(causal_lm(model)).__name__} give",
        why="; ".join(refused),
        fix="report the model's type, or set attn_implementation='sdpa' when loading it",
    )


def _heads(head: Head) -> list[Head]:
    return [head, dataclasses.replace(head, fused=False)] if head.fused else [head]


def _report(refused: list[str], layout: Layout, head: Head) -> None:
    how = "fused head" if head.fused else "the model's own logits"
    line = f"step layout: {_NAMES[layout]}, {how}"
    if refused:
        logger.warning("%s (%s)", line, "; ".join(refused))
    else:
        logger.info("%s", line)


class _Proof:
    """Plain answers of a model, and what they refute."""

    def __init__(self, model: nn.Module, recorded: Recording) -> None:
        self.model = model
        self.recorded = recorded
        self.examples = random_examples(model)
        self.others = random_examples(model, seed=1)
        try:
            self.plain = plain_answers(model, self.examples)
        except FORWARD_ERRORS as error:
            if device_failed(error):
                raise
            raise ModelError(
                f"a forward of {type(causal_lm(model)).__name__} fails",
                why=f"{type(error).__name__}: {first_line(error)}",
                fix="see whether it runs in another dtype (dtype=torch.float32) or with another "
                "attn_implementation",
            ) from error
        low = lowest_precision(model) in (torch.bfloat16, torch.float16)
        with last_bits_disturbed(model):
            disturbed = plain_answers(model, self.examples)
        size = 1.0 + self.plain.values.abs().max().item()
        if is_classifier(model):
            size -= 1.0  # a fresh head's scores are small
        noise = _furthest(disturbed, self.plain)
        eps = torch.finfo(lowest_precision(model)).eps
        self.tolerance = 8.0 * noise + (4.0 if low else 32.0) * eps * size
        self.relative = 0.2 if low else 1e-3

    def refusal(self, layout: Layout, head: Head) -> str | None:
        """Why the layout is not taken; None: nothing speaks against it."""
        speaks_against = {
            "shared": self.recorded.problems,
            "packed": self.recorded.problems,
            "padded": self.recorded.selecting,  # how much it selects of padding depends on the length
            "single": [],
        }
        if speaks_against[layout]:
            return speaks_against[layout][0]
        install(self.model, layout=layout, head=head)
        try:
            return self._dependence(layout) or self._disagreement(layout)
        except FORWARD_ERRORS as error:
            if device_failed(error):
                raise
            return f"{type(error).__name__}: {first_line(error)}"

    def _disagreement(self, layout: Layout) -> str | None:
        found = self._ask(layout, with_gradients=True)
        off = _furthest(found, self.plain)
        if not off <= self.tolerance:
            return f"{_DISAGREES} with plain forwards by {off:.2g} (rounding: {self.tolerance:.2g})"
        if found.gradients is not None and self.plain.gradients is not None:
            norm = self.plain.gradients.norm().clamp_min(1e-30)
            relative = ((found.gradients - self.plain.gradients).norm() / norm).item()
            if not relative <= self.relative:
                return f"its gradients differ from those of plain forwards by {relative:.1%}"
        return None

    def _dependence(self, layout: Layout) -> str | None:
        """What a response's result depends on beside its own text."""
        if layout == "single":
            return None
        base = self._ask(layout)
        off = 0.0
        for examples, kept in exchanges(self.examples, self.others):
            stays = torch.isin(base.owner, torch.tensor(kept))
            other = self._ask(layout, examples)
            if not torch.equal(base.values[stays], other.values[stays]):
                off = max(off, _furthest(base, other, stays))
        if layout == "padded" and not is_classifier(
            self.model
        ):  # its own forward ends rows at padding
            filled = self._ask(layout, pad_token_id=self.others[0]["prompt_ids"][0])
            if not torch.equal(base.values, filled.values):
                off = max(off, _furthest(base, filled))
        if off == 0.0:
            return None
        # Rounding alone: experts compute as many tokens as are routed to them.
        if off <= self.tolerance and not sees_others(
            self.model, self.examples, layout, pad_token_id=self.pad_token_id
        ):
            return None
        return f"a response depends on the other texts of its batch (by {off:.2g})"

    @property
    def pad_token_id(self) -> int:
        config = causal_lm(self.model).config.get_text_config()
        return getattr(config, "pad_token_id", None) or 0

    def _ask(
        self,
        layout: Layout,
        examples: list[dict[str, object]] | None = None,
        *,
        pad_token_id: int | None = None,
        with_gradients: bool = False,
    ) -> Answers:
        return layout_answers(
            self.model,
            self.examples if examples is None else examples,
            layout,
            pad_token_id=self.pad_token_id if pad_token_id is None else pad_token_id,
            with_gradients=with_gradients,
        )


def _furthest(found: Answers, expected: Answers, where: torch.Tensor | None = None) -> float:
    """The largest distance of two answers' values; NaN counts as infinite."""
    off = (found.values - expected.values).abs()
    if where is not None:
        off = off[where]
    return float(torch.nan_to_num(off, nan=float("inf")).max())
