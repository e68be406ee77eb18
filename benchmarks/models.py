"""Tests every causal language model class of transformers on a small random model; writes docs/models.md.

python -m benchmarks.models [family ...] [--reach narrow|wide] [--jobs N] [--json FILE] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.sweep.measure import Result
from tests.sweep.run import SECONDS, all_cases, sweep
from tests.sweep.table import PAGE, incomplete, line_of, page


def main(arguments: list[str] | None = None) -> int:
    """Return 1 if a result is wrong or a crash, otherwise 0."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("families", nargs="*", help="families or variants; default: all")
    parser.add_argument("--reach", choices=["narrow", "wide"], help="default: both")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of processes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit per case")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the results to FILE, one per line"
    )
    parser.add_argument(
        "--from", type=Path, dest="given", metavar="FILE", help="read the results that --json wrote"
    )
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    args = parser.parse_args(arguments)
    reaches = [args.reach == "wide"] if args.reach else [False, True]
    cases = all_cases(args.families, reaches)
    results: list[Result] = []
    for result in (
        _read(args.given) if args.given else sweep(cases, jobs=args.jobs, seconds=args.seconds)
    ):
        results.append(result)
        print(line_of(result), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    if args.write:
        if missing := incomplete(results):
            parser.error(f"--write requires all families in both reaches; missing: {missing}")
        PAGE.write_text(page(results), encoding="utf-8")
    return int(any(result["result"] in ("wrong", "crash") for result in results))


def _read(file: Path) -> Iterator[Result]:
    for line in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


if __name__ == "__main__":
    sys.exit(main())
