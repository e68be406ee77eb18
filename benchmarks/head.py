"""Compares heads: log-probs of N tokens and their gradients, alternating in one process.

    python benchmarks/head.py                     # N = 1024, H = 512, V = 32,000
    python benchmarks/head.py --vocabulary 128256 --tile-mib 128

`dense` computes all logits and uses log_softmax and autograd. `torch` is `linear_cross_entropy` with
automatic chunking, if this version of torch has it (without options it computes all logits, like `dense`).
`liger` is Liger's fused linear cross-entropy, if it is installed (requires a GPU). On a GPU, the peak
memory beyond the inputs is printed too, including gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch
import torch.nn.functional as F
from common import DEVICE, wait
from torch import Tensor

from rpo_trainer.runtime.memory import peak_memory
from rpo_trainer.step.logprobs import linear_logprobs


def dense(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute all logits at once."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def candidates(logits_chunk_bytes: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return functions from hidden states `[N, H]`, weight `[V, H]`, labels `[N]` to log-probs `[N]`."""
    found = {
        "ours": lambda h, w, y: linear_logprobs(h, w, y, logits_chunk_bytes=logits_chunk_bytes),
        "dense": dense,
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch"] = lambda h, w, y: (
            -F.linear_cross_entropy(h, w, y, reduction="none", options=options)
        )
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        if torch.cuda.is_available():
            found["liger"] = lambda h, w, y: -liger(h, w, y, reduction="none")
    except ImportError:
        pass
    return found


def main() -> None:
    """Print the time, the ratio to ours with its spread, and the error against float64 of each head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tile-mib", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the result to FILE as one line"
    )
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, device=DEVICE).to(dtype)
    weight = (torch.randn(args.vocabulary, args.hidden, device=DEVICE) * 0.05).to(dtype)
    labels = torch.randint(args.vocabulary, (args.tokens,), device=DEVICE)
    exact = dense(hidden[:64].double(), weight.double(), labels[:64])
    functions = candidates(args.tile_mib * 2**20)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    errors: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for turn in range(args.rounds + 1):
        for name, function in functions.items():
            taken, peaks[name], logps = _timed(function, hidden, weight, labels)
            errors[name] = (logps[:64].double() - exact).abs().max().item()
            if turn:
                seconds[name].append(taken)
    ratios = {name: record.spread(seconds["ours"], values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{name:6} {statistics.median(values) * 1e3:9.1f} ms   "
            + "{:5.2f} × ours ({:.2f} to {:.2f})   ".format(*ratios[name])
            + f"error {errors[name]:.1e} nats"
            + (f"   {record.mib(peaks[name])}" if DEVICE == "cuda" else "")
        )
    record.append(
        args,
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        ratios=ratios,
        errors=errors,
        peaks=peaks if DEVICE == "cuda" else {},
    )


def _timed(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
) -> tuple[float, int, Tensor]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    wait()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = record.memory_now()
    start = time.perf_counter()
    logps = function(h, w, labels)
    logps.sum().backward()
    wait()
    return time.perf_counter() - start, peak_memory() - before, logps.detach()


if __name__ == "__main__":
    main()
