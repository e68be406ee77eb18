"""Measures the effect of each part of the step, enabled one after another.

Plain → response-only head → packed → shared → cached reference → balanced.

    python benchmarks/ablation.py                      # lengths of real pairs, 8 prompts, 2 per forward pass
    python benchmarks/ablation.py --k 4 --prompt 256 --response 128

Each variant adds one part to the previous one. All parts are this package's own code: its layouts; its head
or the model's full logits; reference log-probs from a second forward pass or cached; examples in the given
order or balanced by cost. A step is the forward and backward pass of every micro-batch and the optimizer
update.

Balancing has no effect on one device, which runs the micro-batches of a step in sequence. It helps ranks
that wait for the slowest one, which the second column simulates with as many ranks as micro-batches: it has
the time of the slowest micro-batch.
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
from rpo_trainer.step.dealing import deal
from rpo_trainer.step.forward import install, token_logprobs
from rpo_trainer.step.logprobs import response_sums
from rpo_trainer.step.packing import forward_tokens, pack


@dataclass(frozen=True)
class Variant:
    """The parts that are enabled."""

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
    """Parse the command line."""
    made = parser(__doc__)
    made.add_argument("--batch", type=int, default=8, help="prompts per optimizer step")
    made.add_argument("--micro", type=int, default=2, help="prompts per forward pass")
    made.add_argument("--k", type=int, default=2, help="responses per prompt")
    made.add_argument(
        "--prompt", type=int, help="tokens per prompt instead of real lengths; requires --response"
    )
    made.add_argument("--response", type=int, help="tokens per response")
    made.add_argument("--lengths", type=Path, default=Path(__file__).with_name("ultrafeedback.csv"))
    args = made.parse_args()
    if (args.prompt is None) != (args.response is None):
        made.error("--prompt and --response must be given together")
    return args


def examples_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one global batch."""
    if args.prompt is None:
        lengths = lengths_of(args.lengths, args.batch, args.k)
        rows = make_rows(args.batch, lengths, args.vocabulary, jitter=0.0)
    else:
        rows = make_rows(args.batch, [(args.prompt, [args.response] * args.k)], args.vocabulary)
    return [row.example(i) for i, row in enumerate(rows)]


def forward(
    model: Any, examples: Sequence[Mapping[str, Any]], layout: Layout
) -> tuple[Tensor, dict[str, Any]]:
    """Return the log-probs `[R]` of the responses of a micro-batch, and the micro-batch."""
    batch = pack(examples, layout).to(torch.device(DEVICE))
    logps = token_logprobs(model, batch.model_inputs)
    return response_sums(logps, batch.response_index, len(batch.response_tokens)), batch


class Step:
    """Runs steps of a variant on one model."""

    def __init__(self, model: Any, optimizer: Any, args: argparse.Namespace, examples: Any) -> None:
        self.model = model
        self.optimizer = optimizer
        self.args = args
        self.examples = examples
        self.given: list[list[float]] | None = None

    def __call__(self, variant: Variant) -> list[float]:
        """Return the seconds of each micro-batch; the last one includes the optimizer update."""
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
            return deal(order, costs, ranks=1, most=size)[0]
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
    """Print the seconds per step and of its slowest micro-batch, with ratios to the previous variant."""
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
    print(
        f"| | s per step | ratio to previous | ratio to plain | slowest of {ranks} | ratio to previous |"
    )
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
