"""Scale, cap and multiplier of the head are determined from the model in any dtype; other operations are
detected."""

from __future__ import annotations

import pytest
import torch

from rpo_trainer.models.multimodal import text_decoder
from rpo_trainer.step.head import Head, head_of
from tests.small_models import make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "extra", "wanted"),
    [
        ("llama", {}, Head()),
        ("cohere", {"logit_scale": 0.0625}, Head(logit_scale=0.0625)),
        ("cohere", {"logit_scale": 0.3}, Head(logit_scale=0.3)),
        ("granite", {"logits_scaling": 4.0}, Head(logit_scale=0.25)),
        ("granite", {"logits_scaling": 3.0}, Head(logit_scale=1 / 3)),
        ("gemma2", {"final_logit_softcapping": 30.0}, Head(softcap=30.0)),
        ("gemma2", {"final_logit_softcapping": 1.5}, Head(softcap=1.5)),
        ("gemma2", {"final_logit_softcapping": None}, Head()),
    ],
)
def test_known_operations_are_found_for_any_weights(family, extra, wanted, dtype):
    model = make_model(family, dtype=dtype, **extra)
    head = head_of(model, model.forward)
    assert head.fused and (head.softcap is None) == (wanted.softcap is None)
    assert head.logit_scale == pytest.approx(wanted.logit_scale, rel=2e-7)
    assert head.hidden_multiplier == 1.0
    assert head.softcap is None or head.softcap == pytest.approx(wanted.softcap, rel=2e-7)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda h: h / 9.0, {"hidden_multiplier": 1 / 9}),
        (lambda h: h * 12.5, {"hidden_multiplier": 12.5}),
        (lambda h: h.tanh(), None),
        (lambda h: h.flip(-1), None),
    ],
)
def test_what_happens_in_front_of_the_head(change, wanted):
    """A multiplier is determined; with any other operation the model's own logits are used."""
    model = make_model("llama")
    run = model.forward

    def forward(**settings):
        handle = model.lm_head.register_forward_pre_hook(lambda _, args: (change(args[0]),))
        try:
            return run(**settings)
        finally:
            handle.remove()

    head = head_of(model, forward)
    if wanted is None:
        assert not head.fused
    else:
        assert head.fused and head.hidden_multiplier == pytest.approx(
            wanted["hidden_multiplier"], rel=2e-7
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits - logits.new_ones(logits.shape[-1]).cumsum(0),  # by token
        lambda logits: logits[..., :-1],
        lambda logits: logits.sigmoid(),
        lambda logits: logits + 1.0,
        lambda logits: logits.clamp(-5.0, 5.0),
    ],
)
def test_logits_that_are_more_than_scaled_and_capped_are_left_to_the_model(change):
    model = make_model("llama")

    def forward(**settings):
        output = model.forward(**settings)
        output.logits = change(output.logits)
        return output

    assert not head_of(model, forward).fused


def test_nothing_of_the_question_stays_in_the_model():
    model = make_model("llama")
    ids = torch.arange(6)[None]
    before = model(ids).logits
    head_of(model, model.forward)
    assert torch.equal(model(ids).logits, before)
    assert "forward" not in vars(model.lm_head) and not model.model._forward_hooks


def test_a_class_that_takes_itself_for_its_decoder():
    model = make_model("llama")
    for wrong in (model, model.lm_head, None):
        model.get_decoder = lambda wrong=wrong: wrong
        assert text_decoder(model) is model.model
        assert head_of(model, model.forward).fused
