"""Measures memory and time of attention with soft-capped scores or sinks by row length, on a GPU.

    python benchmarks/attention.py                          # Gemma-2 9B and GPT-OSS, 4,096 to 16,384 tokens
    python benchmarks/attention.py --shape gpt-oss --lengths 4096,32768 --without explicit

`flex` is FlexAttention; `explicit` computes the full score matrix, as is done where FlexAttention does not
apply. Each figure is a forward and backward pass of one packed row: a prompt of a quarter of the row and
two responses that share it. Requires a GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import record
import torch
from common import DEVICE, wait
from torch import nn

from rpo_trainer.step import attention_flex
from rpo_trainer.step.attention import packed_attention
from rpo_trainer.step.attention_flex import FlexIndex
from rpo_trainer.step.batch import AttentionPlan, Segment

# Query heads, key-value heads, head size, and arguments of the attention function.
SHAPES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "gemma-2": (16, 8, 256, {"softcap": 50.0, "scaling": 256**-0.5}),
    "gpt-oss": (64, 8, 64, {"s_aux": True}),
    "gemma-2-window": (16, 8, 256, {"softcap": 50.0, "scaling": 256**-0.5, "sliding_window": 4096}),
    "gpt-oss-window": (64, 8, 64, {"s_aux": True, "sliding_window": 128}),
}


def main() -> None:
    """Print a line for each shape, implementation and length, and the growth exponent of the memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shape",
        action="append",
        choices=SHAPES,
        help="shape to measure; may be repeated; default: all",
    )
    parser.add_argument(
        "--lengths", default="4096,8192,16384", help="row lengths in tokens, separated by commas"
    )
    parser.add_argument("--without", choices=["flex", "explicit"], help="implementation to omit")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the result to FILE as one line"
    )
    args = parser.parse_args()
    if DEVICE != "cuda":
        sys.exit("benchmarks/attention.py requires a GPU: FlexAttention is not used on a CPU")
    lengths = [int(length) for length in args.lengths.split(",")]
    found: dict[str, Any] = {}
    for name in args.shape or SHAPES:
        for way in ("flex", "explicit"):
            if way == args.without:
                continue
            lines = []
            for tokens in lengths:
                peak, seconds = _measured(name, way, tokens, args)
                lines.append((peak, seconds))
                print(
                    f"{name:15} {way:9} {tokens:7,} tokens "
                    + (
                        "out of memory"
                        if peak is None
                        else f"{seconds * 1e3:9.1f} ms {record.mib(peak)}"
                    ),
                    flush=True,
                )
            found[f"{name} {way}"] = lines
            ends = [
                (tokens, peak) for tokens, (peak, _) in zip(lengths, lines, strict=True) if peak
            ]
            if len(ends) > 1:
                (first, low), (last, high) = ends[0], ends[-1]
                slope = math.log(high / low) / math.log(last / first)
                print(f"{name:15} {way:9} memory grows with exponent {slope:.2f} of the length")
    record.append(args, lengths=lengths, peak_and_seconds=found)


def _measured(
    name: str, way: str, tokens: int, args: argparse.Namespace
) -> tuple[int | None, float]:
    """Return the peak memory beyond the inputs, in bytes (None: out of memory), and the median seconds."""
    heads, kv_heads, size, settings = SHAPES[name]
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    leaves = [
        torch.randn(1, n, tokens, size, device=DEVICE).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]
    settings = dict(settings)
    if settings.pop("s_aux", False):
        settings["s_aux"] = torch.randn(heads, device=DEVICE).to(dtype).requires_grad_()
    if not attention_flex.applies(*leaves):
        sys.exit(
            "FlexAttention does not apply to this GPU and dtype: see rpo_trainer/step/attention_flex.py"
        )
    first = tokens // 8 * 5
    segments = (Segment(0, first), Segment(first, tokens, 0, tokens // 4))
    try:
        seconds = []
        for turn in range(args.rounds + 1):
            index = FlexIndex.of(segments) if way == "flex" else None
            plan = AttentionPlan(segments, flex_index=index).to(torch.device(DEVICE))
            wait()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            out, _ = packed_attention(nn.Module(), *leaves, None, packing_plan=plan, **settings)
            out.sum().backward()
            wait()
            if turn:  # the first round compiles
                seconds.append(time.perf_counter() - start)
            peak = torch.cuda.max_memory_allocated() - before
            del out
            for leaf in leaves:
                leaf.grad = None
        return peak, statistics.median(seconds)
    except torch.OutOfMemoryError:
        return None, math.nan


if __name__ == "__main__":
    main()
