"""Computes the idle share of the ranks: the fraction of the time in which they wait for the slowest one.

    python benchmarks/balance.py
    python benchmarks/balance.py --ranks 8 64 512 --batch 2048 --lengths pairs.jsonl

Real lengths of pairs are dealt to ranks and micro-batches as in training; nothing is trained. The load of a
micro-batch is its number of tokens, and a step takes as long as the slowest rank:

    once per step      1 − Σ load / (ranks × Σ over steps of max over ranks of Σ over micro-batches of load):
                       DDP and ZeRO-1, whose micro-batches are formed by the number of examples
    each micro-batch   1 − Σ load / (ranks × Σ over steps of Σ over micro-batches of max over ranks of load):
                       FSDP, ZeRO-2 and ZeRO-3, whose micro-batches are formed by tokens: by default those of
                       the largest micro-batch by number
    bound              of any assignment: a rank cannot have less than the longest example of a step, nor less
                       than the mean
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import record
from common import lengths_of

from rpo_trainer.step.dealing import idle_share
from rpo_trainer.step.order import StepBatchSampler, TokenBudgetSampler
from rpo_trainer.trainers.loaders import default_budget

LENGTHS = Path(__file__).parent / "ultrafeedback.csv"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4], help="micro-batch sizes")
    parser.add_argument("--batch", type=int, default=256, help="pairs per optimizer step")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument(
        "--lengths", type=Path, default=LENGTHS, help="CSV or JSONL of real pairs; see common.py"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the result to FILE as one line"
    )
    return parser.parse_args()


def costs_of(args: argparse.Namespace) -> list[int]:
    """Return the tokens of as many pairs as there are in all steps, each prompt once."""
    pairs = lengths_of(args.lengths, args.batch * args.steps, 2)
    return [prompt + sum(responses) for prompt, responses in pairs]


def shares(costs: list[int], batch: int, ranks: int, micro: int) -> dict[str, Any]:
    """Return the idle shares of one setting."""
    common: dict[str, Any] = {"global_batch_size": batch, "world_size": ranks}
    by_number = StepBatchSampler(costs, micro_batch_size=micro, **common)
    budget = default_budget(by_number)
    by_tokens = TokenBudgetSampler(costs, budget=budget, micro_batch_size=micro, **common)
    number, tokens = list(by_number.loads()), list(by_tokens.loads())
    least = [
        np.full((ranks, 1), max(step.sum() / ranks, by_number.costs[examples].max()))
        for step, examples in zip(number, by_number.global_batches(), strict=True)
    ]
    return {
        "ranks": ranks,
        "micro": micro,
        "once per step": idle_share(number, each_micro_batch=False),
        "bound": 1 - sum(step.sum() for step in number) / sum(step.sum() for step in least),
        "budget": budget,
        "each micro-batch": idle_share(tokens, each_micro_batch=True),
        "forwards by number": float(np.mean([step.shape[1] for step in number])),
        "forwards by tokens": float(np.mean([step.shape[1] for step in tokens])),
    }


def main() -> None:
    """Print a line for each number of ranks and micro-batch size."""
    args = arguments()
    costs = costs_of(args)
    print(
        f"{args.steps} steps of {args.batch} pairs of {np.mean(costs):.0f} tokens, at most {max(costs)}"
    )
    print(
        f"{'ranks':>5} {'micro':>5} {'once per step':>14} {'each micro-batch':>17} {'bound':>7} "
        f"{'budget':>7} {'forwards':>15}"
    )
    found = []
    for ranks in args.ranks:
        for micro in args.micro:
            one = shares(costs, args.batch, ranks, micro)
            found.append(one)
            forwards = f"{one['forwards by number']:.1f} → {one['forwards by tokens']:.1f}"
            print(
                f"{ranks:5} {micro:5} {one['once per step']:14.1%} {one['each micro-batch']:17.1%} "
                f"{one['bound']:7.1%} {one['budget']:7,} {forwards:>15}"
            )
    record.append(args, idle=found)


if __name__ == "__main__":
    main()
