"""Measures how the cost of a step grows with length, K and vocabulary, with fitted exponents.

    python benchmarks/scaling.py                       # time, over all three
    python benchmarks/scaling.py --over k              # over one of: length, k, vocabulary
    python benchmarks/scaling.py --memory              # peak memory, in a process per point
    python benchmarks/scaling.py --over tile           # which part of the peak grows with the vocabulary
    python benchmarks/scaling.py --peers trl           # also TRL

Exponents are least-squares slopes in log-log space: cost ~ size^exponent. Parts that do not grow with the
size in question (the optimizer update, the vocabulary in a sweep over lengths) lower them. Each point is a
whole step of the trainer, as in step.py, whose options are accepted too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import duel
import record
import step

# Name of a sweep → the options of its points
OVER: dict[str, list[dict[str, Any]]] = {
    "length": [{"prompt": 2 * n // 3, "response": n // 3} for n in (192, 384, 768, 1536)],
    "k": [{"k": k} for k in (2, 4, 8)],
    "vocabulary": [{"vocabulary": v} for v in (8000, 32000, 128000)],
}
_OPTIONS = (
    "size", "vocabulary", "dtype", "tile_mib", "batch", "micro", "steps", "prompt", "response", "k",
    "layout", "lengths",
)  # fmt: skip
TILE = [{"vocabulary": v} for v in (32_000, 128_000, 256_000)]


def arguments() -> argparse.Namespace:
    """Parse the command line: the options of this script and those of step.py."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument(
        "--over", nargs="+", choices=[*OVER, "tile"], default=list(OVER), help="sweeps to run"
    )
    own.add_argument("--points", type=int, help="use only the first POINTS points of each sweep")
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        own.print_help()
    mine, rest = own.parse_known_args()
    args = step.arguments([*rest] if "--peers" in rest else [*rest, "--peers"])
    vars(args).update(vars(mine))
    return args


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Return the slope of log cost over log size."""
    slope, _ = statistics.linear_regression(
        [math.log(x) for x in sizes], [math.log(y) for y in costs]
    )
    return slope


def size_of(over: str, args: argparse.Namespace) -> float:
    """Return the size of a point."""
    if over == "length":
        return float(args.prompt + args.response)
    return float(getattr(args, over))


def seconds(args: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Return the median seconds per step, trainers alternating."""
    trainers = {name: duel.build(args, step.BUILDERS[name]) for name in names}
    found, _ = duel.alternate(trainers, args.rounds)
    return {name: statistics.median(values) for name, values in found.items()}


def options(args: argparse.Namespace) -> list[str]:
    """Return the command line of step.py for these arguments."""
    words = []
    for name in _OPTIONS:
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def peaks(args: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Return the peak bytes of each, measured in its own process, without libraries."""
    script = str(Path(__file__).with_name("step.py"))
    return {
        name: float(duel.measure(["--only", name, *options(args)], script)["used"])
        for name in names
    }


def curve(args: argparse.Namespace, over: str, layouts: list[str]) -> None:
    """Print and record the points of a sweep for each of our layouts and each peer."""
    what = "MiB" if args.memory else "s/step"
    points = OVER[over][: args.points]
    lines: dict[str, list[float]] = {}
    sizes: list[float] = []
    for point in points:
        here = argparse.Namespace(**{**vars(args), **point})
        sizes.append(size_of(over, here))
        for layout in layouts:
            here.layout = layout
            # Peers have no layouts: they run once, with the first.
            names = ["ours", *(args.peers if layout == layouts[0] else [])]
            found = (
                {name: value / 2**20 for name, value in peaks(here, names).items()}
                if args.memory
                else seconds(here, names)
            )
            for name, value in found.items():
                label = f"ours, {layout}" if name == "ours" else name
                lines.setdefault(label, []).append(value)
    print(f"\n{over}: {what}\n")
    print("| | " + " | ".join(f"{size:g}" for size in sizes) + " | exponent |")
    print("|---" * (len(sizes) + 2) + "|")
    slopes = {
        label: exponent(sizes, values) if len(sizes) > 1 else math.nan
        for label, values in lines.items()
    }
    for label, values in lines.items():
        print(
            f"| {label} | " + " | ".join(f"{v:.4g}" for v in values) + f" | {slopes[label]:.2f} |"
        )
    if over == "k" and not args.memory and len(layouts) > 1:
        _print_gain(lines[f"ours, {layouts[0]}"], lines[f"ours, {layouts[1]}"], points, args)
    record.append(args, over=over, what=what, sizes=sizes, points=lines, exponents=slopes)


def _print_gain(
    shared: list[float],
    separate: list[float],
    points: list[dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    """Print separate / shared, and the ratio of tokens: K (p + r) / (p + K r)."""
    p, r = args.prompt, args.response
    gains = [b / a for a, b in zip(shared, separate, strict=True)]
    tokens = [point["k"] * (p + r) / (p + point["k"] * r) for point in points]
    print("| separate / shared | " + " | ".join(f"{g:.2f}" for g in gains) + " | |")
    print("| ratio of tokens | " + " | ".join(f"{t:.2f}" for t in tokens) + " | |")


def tile(args: argparse.Namespace) -> None:
    """Print the peak without weights, gradients and optimizer state, by vocabulary."""
    print(f"\npeak without weights, gradients and optimizer state, tile {args.tile_mib} MiB\n")
    print("| vocabulary | peak | weights | rest |\n|---|---|---|---|")
    script = str(Path(__file__).with_name("step.py"))
    lines = []
    for point in TILE[: args.points]:
        here = argparse.Namespace(**{**vars(args), **point})
        found = duel.measure(["--only", "ours", *options(here)], script)
        cells = " | ".join(record.mib(found[name]) for name in ("peak", "weights", "rest"))
        print(f"| {point['vocabulary']:,} | {cells} |")
        lines.append({**point, **found})
    record.append(args, over="tile", tile_mib=args.tile_mib, memory=lines)


def main() -> None:
    """Run the sweeps."""
    args = arguments()
    for over in args.over:
        if over == "tile":
            tile(args)
        else:
            curve(args, over, ["auto", "packed"] if over == "k" else [args.layout])


if __name__ == "__main__":
    main()
