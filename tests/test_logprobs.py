"""The fused head against a dense float64 one: values and gradients, for every tile shape."""

from __future__ import annotations

import pytest
import torch

from rpo_trainer.logprobs import linear_logprobs, logprobs_from_logits, response_sums

N, H, V = 13, 8, 29


def dense(hidden, weight, labels, bias, scale, softcap):
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)[torch.arange(len(labels)), labels]


def tensors(dtype, *, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (N,), generator=generator)
    b = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    upstream = torch.randn(N, generator=generator, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, b) if x is not None]
    return hidden, weight, labels, b, upstream, leaves


@pytest.mark.parametrize("tile_bytes", [1, 8 * 5, 8 * V * 2, 8 * V * N, 2**29])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_dense_float64(tile_bytes, scale, softcap, bias):
    hidden, weight, labels, b, upstream, leaves = tensors(torch.float64, bias=bias)
    expected = dense(hidden, weight, labels, b, scale, softcap)
    expected_grads = torch.autograd.grad(expected, leaves, upstream)
    actual = linear_logprobs(
        hidden, weight, labels, b, logit_scale=scale, softcap=softcap, tile_bytes=tile_bytes
    )
    grads = torch.autograd.grad(actual, leaves, upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    hidden, weight, labels, _, upstream, leaves = tensors(dtype)
    # The reference sees the very same rounded inputs, in float64.
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = dense(exact[0], exact[1], labels, None, 1.0, None)
    wanted = torch.autograd.grad(expected, exact, upstream)
    actual = linear_logprobs(hidden, weight, labels, tile_bytes=100)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(actual, leaves, upstream.float())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile_bytes", [1, 8 * V * 2, 2**29])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.25, 3.0, True)])
def test_frozen_head_gets_no_gradient_and_hidden_the_same_one(tile_bytes, scale, softcap, bias):
    hidden, weight, labels, b, upstream, _ = tensors(torch.float64, bias=bias)
    expected = dense(hidden, weight, labels, b, scale, softcap)
    (wanted,) = torch.autograd.grad(expected, [hidden], upstream)
    frozen = weight.detach()
    b = None if b is None else b.detach()
    actual = linear_logprobs(
        hidden, frozen, labels, b, logit_scale=scale, softcap=softcap, tile_bytes=tile_bytes
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(actual, [hidden], upstream)
    torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)
    assert frozen.grad is None


def test_frozen_head_costs_two_products_in_all():
    """Logits and dH, nothing recomputed: the backward multiplies no matrices."""
    hidden, weight, labels, *_ = tensors(torch.float64)
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.extend([func] if func._schema.name in ("aten::mm", "aten::addmm") else [])
            return func(*args, **(kwargs or {}))

    with Count():
        logps = linear_logprobs(hidden, weight.detach(), labels, tile_bytes=8 * V * N)
        assert len(products) == 2
        logps.sum().backward()
    assert len(products) == 2


def test_extreme_logits_stay_finite():
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logps = linear_logprobs(hidden, weight, torch.tensor([0, 1]), tile_bytes=8)
    logps.sum().backward()
    assert logps[0] == 0.0 and logps[1] == -2e4
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_no_tensor_of_all_logits_is_allocated():
    """The largest allocation stays at a tile's size while N·V grows past it."""
    n, v, h, tile = 256, 4096, 16, 64 * 1024
    hidden = torch.randn(n, h, requires_grad=True)
    weight = torch.randn(v, h, requires_grad=True)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() * t.element_size() for t in (out,) if isinstance(t, torch.Tensor)
            )
            return out

    with Watch():
        linear_logprobs(hidden, weight, torch.randint(v, (n,)), tile_bytes=tile).sum().backward()
    assert max(sizes) <= max(tile, v * h * 4) < n * v * 4 / 10


def test_logits_path_agrees():
    hidden, weight, labels, _, _, _ = tensors(torch.float64)
    torch.testing.assert_close(
        logprobs_from_logits(hidden @ weight.t(), labels), linear_logprobs(hidden, weight, labels)
    )


def test_response_sums():
    sums = response_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 4)
    assert sums.tolist() == [1.0, 0.0, 6.0, 0.0]


def test_tile_must_be_positive():
    hidden, weight, labels, *_ = tensors(torch.float64)
    with pytest.raises(ValueError, match="tile_bytes must be positive, got 0"):
        linear_logprobs(hidden, weight, labels, tile_bytes=0)
