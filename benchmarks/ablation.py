"""What each part of the step brings, one switched on after another.

Plain → response-only head → packed → shared → cached reference → balanced.

    python benchmarks/ablation.py                      # lengths of real pairs, 8 prompts, 2 a forward
    python benchmarks/ablation.py --k 4 --prompt 256 --response 128

Every line has the switches of the lines above it. All are this package's own code: its layouts, its head or
the model's whole logits, the reference by a second forward or given, examples in the order they come or dealt
by cost. A step is forward and backward of every micro-batch and the optimizer's move.

Balance saves nothing on one device, where the micro-batches of a step run one after another. It is about
ranks that wait for the slowest: the second column is what as many ranks as micro-batches would wait, the
slowest micro-batch's time, measured here one after another.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from common import DEVICE, lengths_of, make_model, make_rows, parser, wait
from torch import Tensor

from rpo_trainer.losses import preference_loss
from rpo_trainer.runtime.memory import peak_memory
from rpo_trainer.step.batch import Layout
from rpo_trainer.step.forward import install, token_logprobs
from rpo_trainer.step.logprobs import response_sums
from rpo_trainer.step.order import deal
from rpo_trainer.step.packing import forward_tokens, pack


@dataclass(frozen=True)
class Variant:
    """The switches of one line."""

    name: str
    layout: Layout = "padded"
    fused: bool = True
    cached: bool = False
    balanced: bool = False


VARIANTS = (
    Variant("plain", fused=False),
    Variant("response-only head"),
    Variant("packed", layout="packed"),
    Variant("shared", layout="shared"),
    Variant("cached reference", layout="shared", cached=True),
    Variant("balanced", layout="shared", cached=True, balanced=True),
)


def arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--batch", type=int, default=8, help="prompts of one optimizer step")
    made.add_argument("--micro", type=int, default=2, help="prompts of one forward")
    made.add_argument("--k", type=int, default=2)
    made.add_argument("--prompt", type=int, help="in place of real lengths, with --response")
    made.add_argument("--response", type=int)
    made.add_argument("--lengths", type=Path, default=Path(__file__).with_name("ultrafeedback.csv"))
    args = made.parse_args()
    if (args.prompt is None) != (args.response is None):
        made.error("--prompt and --response go together")
    return args


def examples_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One global batch."""
    if args.prompt is None:
        lengths = lengths_of(args.lengths, args.batch, args.k)
        rows = make_rows(args.batch, lengths, args.vocabulary, jitter=0.0)
    else:
        rows = make_rows(args.batch, [(args.prompt, [args.response] * args.k)], args.vocabulary)
    return [row.example(i) for i, row in enumerate(rows)]


def forward(
    model: Any, examples: Sequence[Mapping[str, Any]], layout: Layout
) -> tuple[Tensor, dict[str, Any]]:
    """`[R]` sums of one micro-batch, and the micro-batch."""
    batch = pack(examples, layout).to(torch.device(DEVICE))
    logps = token_logprobs(model, batch.model_inputs)
    return response_sums(logps, batch.response_index, len(batch.response_tokens)), batch


class Step:
    """Steps of one variant on one model."""

    def __init__(self, model: Any, optimizer: Any, args: argparse.Namespace, examples: Any) -> None:
        self.model = model
        self.optimizer = optimizer
        self.args = args
        self.examples = examples
        self.given: list[list[float]] | None = None

    def __call__(self, variant: Variant) -> list[float]:
        """Seconds of each micro-batch; the optimizer's move is in the last."""
        install(self.model)
        head = self.model._rpo_head
        head.fused, head.logits_chunk_bytes = variant.fused, self.args.tile_mib * 2**20
        install(self.model, layout=variant.layout, head=head)
        if self.given is None:
            with torch.no_grad():
                self.given = [
                    forward(self.model, [e], variant.layout)[0].tolist() for e in self.examples
                ]
        bins = self._bins(variant)
        seconds = []
        for number, micro in enumerate(bins):
            wait()
            start = time.perf_counter()
            self._micro(variant, micro)
            if number == len(bins) - 1:
                self.optimizer.step()
                self.optimizer.zero_grad()
            wait()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _bins(self, variant: Variant) -> list[list[int]]:
        order, size = list(range(len(self.examples))), self.args.micro
        if variant.balanced:
            costs = [forward_tokens(example, variant.layout) for example in self.examples]
            return deal(order, costs, -(-len(order) // size))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _micro(self, variant: Variant, micro: list[int]) -> None:
        examples = [self.examples[i] for i in micro]
        if variant.cached:
            assert self.given is not None
            examples = [
                {**e, "reference_logps": self.given[i]}
                for e, i in zip(examples, micro, strict=True)
            ]
            sums, batch = forward(self.model, examples, variant.layout)
            reference = batch.reference_logps.to(sums.dtype)
        else:
            with torch.no_grad():
                reference, _ = forward(self.model, examples, variant.layout)
            sums, batch = forward(self.model, examples, variant.layout)
        loss = sums.new_zeros(())
        for group in batch.groups:
            result = preference_loss(
                sums[group], reference[group], loss_type="rpo_bwd_kl", beta=0.1,
                rewards=batch.rewards[group],
            )  # fmt: skip
            loss = loss + result.losses.sum() / len(self.examples)
        loss.backward()


def main() -> None:
    """Prints the table: seconds of a step, and of its slowest micro-batch, with ratios to the line above."""
    args = arguments()
    model = make_model(args.size, args.vocabulary, dtype=args.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    step = Step(model, optimizer, args, examples_of(args))
    whole: dict[str, list[float]] = {v.name: [] for v in VARIANTS}
    slowest: dict[str, list[float]] = {v.name: [] for v in VARIANTS}
    peaks: dict[str, int] = {}
    for turn in range(args.rounds + 1):
        for variant in VARIANTS:
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = step(variant)
            print(f"{turn}: {variant.name}: {sum(seconds):.3f} s", file=sys.stderr)
            if turn:  # the first is warm-up
                whole[variant.name].append(sum(seconds))
                slowest[variant.name].append(max(seconds))
                peaks[variant.name] = peak_memory()
    _table(args, whole, slowest, peaks if DEVICE == "cuda" else {})


def _table(
    args: argparse.Namespace,
    whole: dict[str, list[float]],
    slowest: dict[str, list[float]],
    peaks: dict[str, int],
) -> None:
    names = list(whole)
    ranks = -(-args.batch // args.micro)
    print(f"| | s a step | of the line above | of plain | slowest of {ranks} | of the line above |")
    print("|---|---|---|---|---|---|")
    lines = []
    for above, name in zip([None, *names], names, strict=False):
        line: dict[str, Any] = {
            "name": name,
            "seconds": statistics.median(whole[name]),
            "of_plain": record.spread(whole[names[0]], whole[name])[0],
            "slowest": statistics.median(slowest[name]),
        }
        cells = ["", ""]
        if above is not None:
            line["of_above"] = record.spread(whole[above], whole[name])
            line["slowest_of_above"] = record.spread(slowest[above], slowest[name])
            cells = [
                "{:.2f} ({:.2f} to {:.2f})".format(*line[k])
                for k in ("of_above", "slowest_of_above")
            ]
        print(
            f"| {name} | {line['seconds']:.3f} | {cells[0]} | {line['of_plain']:.2f} "
            f"| {line['slowest']:.3f} | {cells[1]} |"
            + (f" {record.mib(peaks[name])} |" if peaks else "")
        )
        lines.append({**line, **({"peak": peaks[name]} if peaks else {})})
    record.append(args, ablation=lines, ranks=ranks)


if __name__ == "__main__":
    main()
