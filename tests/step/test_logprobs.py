"""The fused head compared with a dense float64 head: values and gradients, for every tile shape."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from rpo_trainer.step import logprobs
from rpo_trainer.step.logprobs import linear_logprobs, logprobs_from_logits, response_sums

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


@pytest.mark.parametrize("logits_chunk_bytes", [1, 8 * 5, 8 * V * 2, 8 * V * N, 2**29])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_dense_float64(logits_chunk_bytes, scale, softcap, bias):
    hidden, weight, labels, b, upstream, leaves = tensors(torch.float64, bias=bias)
    expected = dense(hidden, weight, labels, b, scale, softcap)
    expected_grads = torch.autograd.grad(expected, leaves, upstream)
    actual = linear_logprobs(
        hidden,
        weight,
        labels,
        b,
        logit_scale=scale,
        softcap=softcap,
        logits_chunk_bytes=logits_chunk_bytes,
    )
    grads = torch.autograd.grad(actual, leaves, upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    hidden, weight, labels, _, upstream, leaves = tensors(dtype)
    # The dense head has the same rounded inputs, in float64.
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = dense(exact[0], exact[1], labels, None, 1.0, None)
    wanted = torch.autograd.grad(expected, exact, upstream)
    actual = linear_logprobs(hidden, weight, labels, logits_chunk_bytes=100)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(actual, leaves, upstream.float())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("logits_chunk_bytes", [1, 8 * V * 2, 2**29])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.25, 3.0, True)])
def test_frozen_head_gets_no_gradient_and_hidden_the_same_one(
    logits_chunk_bytes, scale, softcap, bias
):
    hidden, weight, labels, b, upstream, _ = tensors(torch.float64, bias=bias)
    expected = dense(hidden, weight, labels, b, scale, softcap)
    (wanted,) = torch.autograd.grad(expected, [hidden], upstream)
    frozen = weight.detach()
    b = None if b is None else b.detach()
    actual = linear_logprobs(
        hidden,
        frozen,
        labels,
        b,
        logit_scale=scale,
        softcap=softcap,
        logits_chunk_bytes=logits_chunk_bytes,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(actual, [hidden], upstream)
    torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)
    assert frozen.grad is None


def test_frozen_head_costs_two_products_in_all():
    """Logits and dH are computed once: the backward has no matrix products."""
    hidden, weight, labels, *_ = tensors(torch.float64)
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.extend([func] if "mm" in func._schema.name else [])
            return func(*args, **(kwargs or {}))

    with Count():
        logps = linear_logprobs(hidden, weight.detach(), labels, logits_chunk_bytes=2 * 8 * V * N)
        assert len(products) == 2
        logps.sum().backward()
    assert len(products) == 2


def test_extreme_logits_stay_finite():
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logps = linear_logprobs(hidden, weight, torch.tensor([0, 1]), logits_chunk_bytes=8)
    logps.sum().backward()
    assert logps[0] == 0.0 and logps[1] == -2e4
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def peak_bytes(run) -> int:
    """Peak memory of the allocations of `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _results = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("dtype", "softcap"), [("float32", None), ("float32", 3.0), ("bfloat16", None)]
)
def test_memory_grows_with_neither_tokens_times_vocabulary(dtype, softcap, frozen):
    """In addition to the gradients: tiles of bounded size, and a few numbers for each token."""
    h, tile, dtype = 32, 2**18, getattr(torch, dtype)

    def beyond(n: int, v: int) -> int:
        hidden = torch.randn(n, h).to(dtype).requires_grad_()
        weight = torch.randn(v, h).to(dtype).requires_grad_(not frozen)
        labels, upstream = torch.randint(v, (n,)), torch.randn(n)
        leaves = [hidden] if frozen else [hidden, weight]

        def run():
            logps = linear_logprobs(
                hidden, weight, labels, softcap=softcap, logits_chunk_bytes=tile
            )
            return logps, torch.autograd.grad(logps, leaves, upstream)

        # d_hidden is summed in float32, d_weight in its own dtype.
        return peak_bytes(run) - 4 * n * h - (0 if frozen else dtype.itemsize * v * h)

    beyond(8, 8)
    sizes = [beyond(n, v) for n, v in ((512, 2048), (512, 8192), (1024, 8192))]
    per_token = 512 * (64 + 2 * h)  # normalizers, labels, d_hidden in its own dtype
    # A soft-cap's derivative needs two temporaries; a bfloat16 weight is converted, with a separate
    # gradient sum.
    tiles = 1 if dtype == torch.float32 and softcap is None else 3
    assert sizes[0] <= tiles * tile + per_token
    assert sizes[1] <= tiles * tile + per_token
    assert sizes[2] <= tiles * tile + 2 * per_token
    assert 15 * max(sizes) < 1024 * 8192 * 4


def test_the_forward_holds_one_tile():
    """A tile is freed before the next one is computed, and there is no other tensor of its size."""
    n, v, h, tile = 512, 8192, 32, 2**18
    hidden, weight = torch.randn(n, h), torch.randn(v, h, requires_grad=True)
    labels = torch.randint(v, (n,))

    def run():
        return linear_logprobs(hidden, weight, labels, logits_chunk_bytes=tile)

    run()
    assert tile <= peak_bytes(run) <= tile + n * 64


def test_autocast_does_not_round_the_tiles():
    hidden, weight, labels, _, upstream, _ = tensors(torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    for head in (weight, weight.detach()):
        leaves = [x for x in (half, head) if x.requires_grad]
        expected = linear_logprobs(half, head, labels, logits_chunk_bytes=100)
        wanted = torch.autograd.grad(expected, leaves, upstream.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = linear_logprobs(half, head, labels, logits_chunk_bytes=100)
            grads = torch.autograd.grad(actual, leaves, upstream.float())
        assert torch.equal(actual, expected)
        assert all(map(torch.equal, grads, wanted))


@pytest.fixture
def halves_as_on_a_gpu(monkeypatch):
    """Products of a GPU with 16-bit factors: summed and returned in float32."""
    products = []
    mm = torch.mm

    def emulated(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b)
        assert a.dtype == b.dtype and out_dtype == torch.float32
        products.append(a.dtype)
        return mm(a.float(), b.float(), out=out)

    monkeypatch.setattr(logprobs, "_factor_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(torch, "mm", emulated)
    return products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_chunk_bytes", [1, 4 * 40, 4 * V * 4, 2**29])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.25, 3.0, True)])
@pytest.mark.parametrize("kind", ["trained", "frozen", "master"])
def test_halves_multiplied_into_float32(
    halves_as_on_a_gpu, dtype, logits_chunk_bytes, scale, softcap, bias, kind
):
    hidden, weight, labels, b, upstream, _ = tensors(dtype, bias=bias)
    inputs = [hidden, weight, *([] if b is None else [b])]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense(exact[0], exact[1], labels, exact[2] if bias else None, scale, softcap)
    wanted = torch.autograd.grad(expected, exact, upstream)
    if kind == "frozen":
        weight, b = weight.detach(), None if b is None else b.detach()
    elif kind == "master":  # float32 weights under autocast
        weight = weight.detach().float().requires_grad_()
    leaves = [x for x in (hidden, weight, b) if x is not None and x.requires_grad]
    actual = linear_logprobs(
        hidden,
        weight,
        labels,
        b,
        logit_scale=scale,
        softcap=softcap,
        logits_chunk_bytes=logits_chunk_bytes,
    )
    # In the forward only the inputs are rounded ...
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(actual, leaves, upstream.float())
    assert halves_as_on_a_gpu and set(halves_as_on_a_gpu) == {dtype}
    for grad, leaf, want in zip(grads, leaves, wanted, strict=False):
        assert grad.dtype == leaf.dtype
        # ... and in the backward d_logits and the result.
        error = (grad.double() - want).norm() / want.norm()
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("frozen", [False, True])
def test_torch_has_the_product_of_halves(frozen, monkeypatch):
    """Shapes and dtypes of the real function on fake tensors."""
    monkeypatch.setattr(logprobs, "_factor_dtype", lambda hidden: hidden.dtype)
    hidden, weight = (
        torch.empty(n, H, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (N, V)
    )
    weight.requires_grad_(not frozen)
    labels = torch.empty(N, device="meta", dtype=torch.long)
    out = linear_logprobs(hidden, weight, labels, logits_chunk_bytes=4 * 40)
    assert out.shape == (N,) and out.dtype == torch.float32
    out.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert (weight.grad is None) == frozen


def test_halves_stay_as_they_are_on_a_gpu_only():
    for device, dtype, factor in (
        ("cuda", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float16, torch.float16),
        ("cuda", torch.float32, torch.float32),
        ("cpu", torch.bfloat16, torch.float32),
        ("cpu", torch.float64, torch.float64),
    ):
        with FakeTensorMode():
            assert logprobs._factor_dtype(torch.empty(1, device=device, dtype=dtype)) == factor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["trained", "frozen", "autocast"])
@pytest.mark.parametrize("logits_chunk_bytes", [2**16, 2**29])
def test_halves_on_a_gpu(kind, logits_chunk_bytes):
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(1000, 64, device="cuda").bfloat16()
    labels, upstream = torch.randint(1000, (300,), device="cuda"), torch.randn(300, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = dense(*exact, labels, None, 1.0, None)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    if kind == "autocast":
        weight = weight.float()
    weight.requires_grad_(kind != "frozen")
    leaves = [hidden] if kind == "frozen" else [hidden, weight]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=kind == "autocast"):
        actual = linear_logprobs(hidden, weight, labels, logits_chunk_bytes=logits_chunk_bytes)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    for grad, want in zip(torch.autograd.grad(actual, leaves, upstream), wanted, strict=False):
        assert (grad.double() - want).norm() / want.norm() < 2 * torch.finfo(torch.bfloat16).eps


def test_no_token_at_all():
    hidden, weight, labels, b, _, leaves = tensors(torch.float64, bias=True)
    logps = linear_logprobs(hidden[:0], weight, labels[:0], b)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(leaf.grad.abs().sum() == 0.0 for leaf in leaves)


def test_a_vocabulary_padded_by_its_bias():
    """Slices of only −inf add nothing."""
    hidden, weight, labels, _, upstream, leaves = tensors(torch.float64)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[20:] = float("-inf")
    labels = labels % 20
    expected = dense(hidden, weight[:20], labels, None, 1.0, None)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for head in (weight, weight.detach()):
        actual = linear_logprobs(hidden, head, labels, bias, logits_chunk_bytes=8 * 5)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, [hidden], upstream, retain_graph=True)[0], wanted[0]
        )


def test_logits_path_agrees():
    hidden, weight, labels, _, _, _ = tensors(torch.float64)
    torch.testing.assert_close(
        logprobs_from_logits(hidden @ weight.t(), labels), linear_logprobs(hidden, weight, labels)
    )


def test_response_sums():
    sums = response_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 4)
    assert sums.tolist() == [1.0, 0.0, 6.0, 0.0]


@pytest.mark.parametrize("tokens", [1, 2000, 2401, 5000, 16384])
def test_slices_are_aligned_for_the_fast_kernels(tokens):
    """Rows of 16-bit numbers that are not aligned to 16 bytes make a GPU's products slow."""
    for vocabulary, hidden in ((128256, 2048), (49152, 576), (1000, 64)):
        _, width = logprobs._tiles(
            tokens, vocabulary, hidden, logprobs.DEFAULT_LOGITS_CHUNK_BYTES // 4
        )
        assert width == vocabulary or width % 64 == 0
    assert [logprobs._aligned(n) for n in (1, 40, 64, 100, 53687)] == [1, 40, 64, 64, 53632]


def test_tile_must_be_positive():
    hidden, weight, labels, *_ = tensors(torch.float64)
    with pytest.raises(ValueError, match="logits_chunk_bytes"):
        linear_logprobs(hidden, weight, labels, logits_chunk_bytes=0)
