"""The head's Triton kernels compared with float64: in Triton's interpreter on a CPU, compiled for a GPU
without one, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_trainer.step import logprobs
from rpo_trainer.step.logprobs import linear_logprobs

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@compiled
@pytest.mark.slow
def test_in_the_interpreter():
    """Triton reads the variable when it is imported, so the tests below run in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def tile(rows: int, width: int, *, v0: int, spread: float = 8.0):
    """Logits as a slice of a wider tensor, labels inside and outside the slice, normalizer, gradient."""
    generator = torch.Generator().manual_seed(rows + width)
    whole = spread * torch.randn(rows, width + 3, generator=generator)
    labels = torch.randint(0, 2 * v0 + width, (rows,), generator=generator)
    labels[:5] = torch.tensor([v0, v0 + width - 1, v0 - 1, v0 + width, 2**40 + v0])[:rows]
    logits = whole[:, 1 : width + 1]
    upstream = torch.randn(rows, generator=generator)
    return whole, logits, labels, whole.logsumexp(1), upstream


@interpreted
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("width", [1, 64, 4096, 9001])
@pytest.mark.parametrize("v0", [1, 5000])
def test_logsumexp(rows, width, v0):
    from rpo_trainer.step import head_kernels

    whole, logits, labels, *_ = tile(rows, width, v0=v0)
    before = whole.clone()
    if rows == 7:
        logits[3] = before[3, 1:-2] = float("-inf")  # a padded vocabulary
        logits[4, ::2] = before[4, 1:-2:2] = float("-inf")
    total, found = head_kernels.logsumexp(logits, labels, v0)
    torch.testing.assert_close(total.double(), logits.double().logsumexp(1))
    _, wanted, _ = logprobs._logsumexp(logits, labels, v0, in_place=False)
    assert torch.equal(found, wanted)
    assert torch.equal(whole, before)


@interpreted
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("width", [1, 64, 4096, 9001])
@pytest.mark.parametrize("v0", [1, 5000])
def test_statistics(rows, width, v0):
    from rpo_trainer.step import head_kernels
    from rpo_trainer.step.token_stats import slice_stats

    whole, logits, labels, *_ = tile(rows, width, v0=v0)
    if rows == 7:
        logits[3] = float("-inf")
        logits[4, ::2] = float("-inf")
    before = whole.clone()
    total, found, stats = head_kernels.logsumexp_and_stats(logits, labels, v0)
    wanted, lse = slice_stats(logits.double(), with_mean=True)
    torch.testing.assert_close(total.double(), lse)
    assert torch.equal(found, head_kernels.logsumexp(logits, labels, v0)[1])
    for own, theirs in zip(stats, wanted, strict=True):
        torch.testing.assert_close(own.double(), theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole, before)


@interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_logit_is_not_lost(value):
    from rpo_trainer.step import head_kernels

    _, logits, labels, *_ = tile(2, 9001, v0=1)
    logits[1, 4500] = value
    assert head_kernels.logsumexp(logits, labels, 1)[0].isnan().tolist() == [False, True]


@interpreted
@pytest.mark.parametrize(
    ("rows", "width", "v0"), [(0, 64, 1), (1, 64, 1), (7, 1, 5000), (7, 9001, 5000)]
)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 30.0), (2, 20)])
@pytest.mark.parametrize("grad", ["none", "own", "one for all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slope(rows, width, v0, scale, softcap, grad, dtype):
    from rpo_trainer.step import head_kernels

    whole, logits, labels, normalizer, upstream = tile(rows, width, v0=v0)
    if softcap is not None:
        whole.clamp_(-softcap, softcap)
    before, label_column = whole.clone(), labels - v0
    upstream = {"none": None, "own": upstream, "one for all": torch.tensor(0.3).expand(rows)}[grad]
    wanted = torch.zeros(rows, width, dtype=torch.float64)
    for row, column in enumerate(label_column.tolist()):
        if 0 <= column < width:
            wanted[row, column] = 1.0
    wanted -= (logits.double() - normalizer.double()[:, None]).exp()
    if softcap is not None:
        wanted *= 1.0 - (logits.double() / softcap).square()
    wanted *= scale * (1.0 if upstream is None else upstream.double()[:, None])
    out = torch.empty(rows, width, dtype=dtype)
    settings = (normalizer, labels, v0, upstream, scale, softcap)
    assert head_kernels.slope(logits, *settings, out) is out
    eps = max(torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(out.double(), wanted, rtol=eps, atol=1e-6)
    assert torch.equal(whole, before)
    if dtype == torch.float32:  # in place: bitwise equal
        head_kernels.slope(logits, *settings, logits)
        assert torch.equal(logits, out) and torch.equal(whole[:, 0], before[:, 0])


@interpreted
@pytest.mark.parametrize("kind", ["trained", "bias", "frozen"])
@pytest.mark.parametrize("logits_chunk_bytes", [4 * 40, 4 * 29 * 4, 2**29])
def test_the_head_takes_them(kind, logits_chunk_bytes, monkeypatch):
    from rpo_trainer.step import head_kernels

    def run(hidden, weight, bias):
        logps = linear_logprobs(
            hidden,
            weight,
            labels,
            bias,
            logit_scale=0.5,
            softcap=9.0,
            logits_chunk_bytes=logits_chunk_bytes,
        )
        leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
        once, again = (
            torch.autograd.grad(logps, leaves, upstream, retain_graph=True) for _ in "12"
        )
        assert all(map(torch.equal, once, again))  # a saved tile is not modified
        return logps.detach(), *once

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (13, 29))
    bias = torch.randn(29, generator=generator) if kind == "bias" else None
    labels = torch.randint(29, (13,), generator=generator)
    upstream = torch.randn(13, generator=generator)
    for x in [hidden, *([] if kind == "frozen" else [weight]), *([] if bias is None else [bias])]:
        x.requires_grad_()
    wanted = run(hidden, weight, bias)
    tiles = []

    def kernels(logits):
        tiles.append(logits.shape)
        return head_kernels

    monkeypatch.setattr(logprobs, "_kernels", kernels)
    for got, want in zip(run(hidden, weight, bias), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    assert tiles
    assert linear_logprobs(hidden[:0], weight, labels[:0]).shape == (0,)


@interpreted
def test_where_they_cannot_be_built_a_warning_says_so_once(monkeypatch, caplog):
    from rpo_trainer.step import head_kernels

    def fails(*_):
        raise RuntimeError("no ptxas here")

    assert head_kernels.works_on(torch.device("cpu"))
    monkeypatch.setattr(head_kernels, "logsumexp", fails)
    assert not any(head_kernels.works_on(torch.device("cpu", 0)) for _ in range(2))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "no ptxas here" in record.getMessage()


@compiled
@pytest.mark.parametrize(
    ("arch", "half", "full"),
    [(90, "bf16", False), (90, "bf16", True), (90, "fp32", True), (80, "fp16", True)],
)
def test_they_compile_for_a_gpu(arch, half, full, monkeypatch, tmp_path):
    """Types and machine code, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rpo_trainer.step import head_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"LEAST": head_kernels._LEAST, "BLOCK": head_kernels._BLOCK}
    pointers = {
        "logits": "*fp32", "labels": "*i64", "partial": "*fp64", "found": "*fp32",
        "normalizer": "*fp32", "out": f"*{half}",
    }  # fmt: skip
    given = {"grad": "*fp32", "softcap": "fp32"}
    kernels = (
        head_kernels._logsumexp_kernel, head_kernels._logsumexp_and_stats_kernel,
        head_kernels._slope_kernel,
    )  # fmt: skip
    for kernel in kernels:
        signature, values = {}, {}
        for name in kernel.arg_names:
            if name in constants or (name in given and not full):
                signature[name], values[name] = "constexpr", constants.get(name)
            else:
                others = {**pointers, **given, "logit_scale": "fp32"}
                signature[name] = others.get(name, "i64" if full and "stride" in name else "i32")
        made = triton.compile(
            ASTSource(kernel, signature, constexprs=values), target=GPUTarget("cuda", arch, 32)
        )
        assert made.asm["cubin"]
    assert [p.name for p in head_kernels._slope_kernel.params if p.is_constexpr] == ["BLOCK"]


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "frozen", "autocast", "capped", "bias"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "logits_chunk_bytes"),
    [(300, 1000, 2**16), (301, 1001, 2**29), (3000, 128256, 2**29), (40, 128256, 2**29)],
)
def test_on_a_gpu_as_torch_operations(kind, rows, vocabulary, logits_chunk_bytes, monkeypatch):
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    hidden = (0.25 * torch.randn(rows, 64, device="cuda")).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64, device="cuda").to(dtype)
    weight = (weight.float() if kind == "autocast" else weight).requires_grad_(kind != "frozen")
    bias = torch.randn(vocabulary, device="cuda", requires_grad=True) if kind == "bias" else None
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    upstream = torch.randn(rows, device="cuda")
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    settings = {"logit_scale": 0.5, "softcap": 9.0} if kind == "capped" else {}

    def run():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=kind == "autocast"):
            logps = linear_logprobs(
                hidden, weight, labels, bias, logits_chunk_bytes=logits_chunk_bytes, **settings
            )
        return logps.detach(), torch.autograd.grad(logps, leaves, upstream)

    assert logprobs._kernels(torch.zeros(1, 1, device="cuda")) is not None
    actual, grads = run()
    monkeypatch.setattr(logprobs, "_kernels", lambda logits: None)
    expected, wanted = run()
    torch.testing.assert_close(actual, expected, rtol=0, atol=4e-6)
    for grad, want in zip(grads, wanted, strict=True):
        # Equal up to rounding of single elements of d_logits.
        bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 4
        assert (grad.double() - want.double()).norm() < bound * want.double().norm()
