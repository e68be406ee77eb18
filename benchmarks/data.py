"""Measures the start of a training on many rows: CPU time to the first step, memory, reads of the source.

    python benchmarks/data.py --kind pair --data pairs.jsonl    # 10,000 and 100,000 rows made from the file's
    python benchmarks/data.py --kind k4 --parts memory          # two processes, four responses a row
    python benchmarks/data.py --size tiny                       # tries the script

`run` is `rpo-trainer run` with a recipe of one stage, `ours` the library's trainer on rows of `datasets`,
`trl` TRL's trainer on the same (`datasets.map` in one process, caching on), `tokenizer` the fast tokenizer
alone on the same texts, in batches. All are new processes on one thread, with a model of almost no size. Cold
starts have no cache; a warm start is the second one, in the same directories, after a first one that was
stopped at its first step.

CPU time is user and system time of the process and its descendants, from its start to the end of the first
optimizer step. It includes imports, loading the model, and the step. `imports` is the time of a warm start
until it has imported all modules that the cold one loaded, which it does first; `step` is the time since
training began: the first batch and the work of the model. For DPO and RPO the forward passes for reference
log-probs are replaced by zeros (`data_child.py`). Private memory is the resident anonymous memory of a
process, sampled five times a second.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import data_rows
import record
from data_measure import Measured, measure

FAR = 800_000  # rows of the extrapolation
GIB = 2**30
COLD_RATIO, WARM_SECONDS, BYTES_PER_ROW, TOTAL_BYTES = 1.15, 2.0, 512.0, 3 * GIB
STARTS = ("cold", "warm")
SUBJECTS = ("run", "ours", "trl", "tokenizer")
_Figures = dict[str, Any]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("--kind", default="pair", choices=data_rows.KINDS, help="kind of rows")
    made.add_argument(
        "--data", type=Path, metavar="FILE", help="JSONL rows of that kind; default: random words"
    )
    made.add_argument("--rows", type=int, nargs=2, metavar="N", help="default: 10000 100000")
    made.add_argument("--rounds", type=int, default=1, help="number of measured rounds")
    made.add_argument("--size", default="full", choices=["full", "tiny"], help="tiny: few rows")
    made.add_argument(
        "--parts", nargs="+", default=["cpu", "memory", "reads"], choices=["cpu", "memory", "reads"]
    )  # fmt: skip
    made.add_argument(
        "--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS, help="what is timed"
    )
    made.add_argument("--folder", type=Path, help="working directory; default: a temporary one")
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="append the result to FILE as one line"
    )
    args = made.parse_args()
    if args.rows is None:
        args.rows = [10_000, 100_000] if args.size == "full" else [100, 200]
    if not 0 < args.rows[0] < args.rows[1]:
        made.error("--rows must be two increasing numbers")
    if args.kind == "k4":
        # TRL has no trainer for more than two responses.
        args.subjects = [name for name in args.subjects if name != "trl"]
    return args


class Bench:
    """One kind of rows in two sizes."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.base = data_rows.base_rows(args.kind, args.data)
        self.model = folder / "model"
        data_rows.write_model(self.base, self.model)

    def source(self, rows: int) -> Path:
        """Return the file with that many rows."""
        path = self.folder / f"{rows}.jsonl"
        if not path.exists():
            data_rows.write_rows(self.base, rows, path)
        return path

    def start(
        self, subject: str, rows: int, place: Path, *, ranks: int = 1, preload: Path | None = None
    ) -> Measured:
        """Start a training in a directory, which keeps what it caches."""
        place.mkdir(parents=True, exist_ok=True)
        source = self.source(rows)
        if subject == "run":
            recipe = place / "recipe.yaml"
            if not recipe.exists():
                data_rows.write_recipe(self.args.kind, source, self.model, recipe)
            command = ["run", str(recipe), str(place / "run")]
        else:
            kind = [] if subject == "tokenizer" else [self.args.kind]
            output = [] if subject == "tokenizer" else [str(place / "output")]
            command = [subject, *kind, str(self.model), str(source), *output]
        return measure(command, source, place, ranks=ranks, preload=preload)

    # --- parts ---

    def cpu(self) -> _Figures:
        """Return the figures of single processes by size, subject and start: one for each round."""
        found: _Figures = {}
        for number in range(self.args.rounds):
            for rows in self.args.rows:
                entries = found.setdefault(str(rows), {})
                for start in STARTS:
                    for subject in self.args.subjects:
                        if subject == "tokenizer" and start == "warm":
                            continue
                        place = self.folder / f"{rows}-{number}" / subject
                        names = place / "modules.json"
                        preload = names if start == "warm" else None
                        measured = self.start(subject, rows, place, preload=preload)
                        entry = entries.setdefault(subject, {})
                        entry.setdefault(start, []).append(measured.figures())
                        if start == "cold":
                            modules = measured.reports["0"].get("modules")
                            names.write_text(json.dumps(modules))
                        _say(f"{rows:,} rows, {subject}, {start}: {measured.cpu:.1f} s")
        return found

    def memory(self) -> _Figures:
        """Return the memory of `run` on two processes, by size and start."""
        found: _Figures = {}
        for rows in self.args.rows:
            for start in STARTS:
                measured = self.start("run", rows, self.folder / f"{rows}-two", ranks=2)
                found.setdefault(str(rows), {})[start] = measured.figures()
                _say(f"{rows:,} rows, two processes, {start}: {measured.cpu:.1f} s in all")
        return found

    def reads(self) -> _Figures:
        """Return how often the source is read in a run to its end: three rounds, two processes."""
        rows = max(16, self.args.rows[0] // 10)
        place = self.folder / "reads"
        place.mkdir()
        recipe, source = place / "recipe.yaml", self.source(rows)
        settings = {"repeat": 3, "max_steps": 1}
        data_rows.write_recipe(self.args.kind, source, self.model, recipe, **settings)
        command = ["run", str(recipe), str(place / "run")]
        measured = measure(command, source, place, ranks=2, to_end=True)
        return {"rows": rows, **measured.reads}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- figures ---


def exponent(rows: list[int], values: list[float]) -> float:
    """Return the slope between two points in log-log."""
    if min(values) <= 0:
        return math.nan
    return math.log(values[1] / values[0]) / math.log(rows[1] / rows[0])


def slope(rows: list[int], values: list[float]) -> float:
    """Return the difference per row between two points."""
    return (values[1] - values[0]) / (rows[1] - rows[0])


def cpu_lines(rows: list[int], found: _Figures) -> list[_Figures]:
    """Return a line per subject and start: medians over the rounds, at both sizes."""
    lines = []
    for subject, entry in found[str(rows[0])].items():
        for start in STARTS:
            if start not in entry:
                continue
            both = [found[str(n)][subject] for n in rows]
            total = [statistics.median(one["cpu"] for one in each[start]) for each in both]
            step = [statistics.median(one["step"] for one in each[start]) for each in both]
            loading = [_imports(each) for each in both]
            beyond = [
                statistics.median(one["cpu"] - one["imports"] for one in each["warm"])
                if start == "warm"
                else cold - imports
                for each, cold, imports in zip(both, total, loading, strict=True)
            ]
            lines.append(
                {
                    "subject": subject,
                    "start": start,
                    "rounds": [[one["cpu"] for one in each[start]] for each in both],
                    "total": total,
                    "imports": loading,
                    "step": step,
                    "beyond": beyond,
                    "exponent": exponent(rows, beyond),
                    "per_row": slope(rows, beyond),
                    "far": beyond[1] + slope(rows, beyond) * (FAR - rows[1]),
                }
            )
    return lines


def _imports(entry: _Figures) -> float:
    """Return the median CPU seconds of the imports, which only warm starts measure."""
    return statistics.median(one["imports"] for one in entry.get("warm", [{"imports": 0.0}]))


def memory_lines(rows: list[int], single: _Figures, double: _Figures) -> list[_Figures]:
    """Return a line per process of `run` and start."""
    kinds: list[tuple[str, str, list[_Figures]]] = []
    for start in STARTS:
        if "run" in single.get(str(rows[0]), {}):
            kinds.append(("1 process", start, [single[str(n)]["run"][start][0] for n in rows]))
        if double:
            kinds.append(("2 processes", start, [double[str(n)][start] for n in rows]))
    lines = []
    for processes, start, both in kinds:
        for rank in both[0]["ranks"]:
            each = [one["ranks"][rank] for one in both]
            private = [one["peak"]["Anonymous"] for one in each]
            at_step = [one["at_step"]["Anonymous"] for one in each]
            lines.append(
                {
                    "process": f"{processes}, rank {rank}",
                    "start": start,
                    "private_peak": private,
                    "private_at_step": at_step,
                    "per_row": slope(rows, private),
                    "per_row_at_step": slope(rows, at_step),
                    "uss_peak": [one["peak"]["Uss"] for one in each],
                    "shared_at_step": [one["at_step"]["Shared"] for one in each],
                    "data_mapped": [one["at_step"]["DataMapped"] for one in each],
                    "far": private[1] + slope(rows, private) * (FAR - rows[1]),
                    "all": [one["total_peak"] for one in both],
                }
            )
    return lines


def bars(args: argparse.Namespace, result: _Figures) -> list[tuple[str, float, float]]:
    """Return (what, value, limit) of each bar that was measured."""
    found: list[tuple[str, float, float]] = []
    largest = f"{args.rows[1]:,} rows"
    lines = {(one["subject"], one["start"]): one for one in result.get("cpu", [])}
    for subject in ("run", "ours"):
        if (peer := lines.get(("trl", "cold"))) and (subject, "cold") in lines:
            ratio = lines[subject, "cold"]["total"][1] / peer["total"][1]
            found.append((f"{subject}, cold: CPU time / TRL's, {largest}", ratio, COLD_RATIO))
            mine, theirs = (
                one["total"][1] - one["step"][1] for one in (lines[subject, "cold"], peer)
            )
            found.append((f"{subject}, cold: the same without the step", mine / theirs, COLD_RATIO))
        if (subject, "warm") in lines:
            seconds = lines[subject, "warm"]["beyond"][1]
            found.append(
                (f"{subject}, warm: CPU s beyond imports, {largest}", seconds, WARM_SECONDS)
            )
    for one in result.get("memory", []):
        name = f"{one['process']}, {one['start']}: private bytes a row at the peak"
        found.append((name, one["per_row"], BYTES_PER_ROW))
    if args.kind == "k4":
        totals = [one["all"][1] for one in result.get("memory", []) if one["process"][0] == "2"]
        if totals:
            name = f"2 processes, K = 4: GiB in all, {largest}"
            found.append((name, max(totals) / GIB, TOTAL_BYTES / GIB))
    if reads := result.get("reads"):
        name = "reads of the source in a run of 3 rounds on 2 processes, without digests"
        found.append((name, reads["other"], 1.0))
    return found


# --- tables ---


def show(args: argparse.Namespace, result: _Figures) -> None:
    """Print the tables."""
    small, large = (f"{n:,}" for n in args.rows)
    if lines := result.get("cpu"):
        print(f"\nCPU seconds to the first step; beyond imports: {small} → {large} rows\n")
        print(
            f"| {args.kind} | start | {small}: all | imports | step | {large}: all | imports | step "
            f"| beyond imports | µs a row | exponent | {FAR:,} rows [est] |\n"
            f"|---|---|{'--:|' * 10}"
        )
        for one in lines:
            sizes = zip(one["total"], one["imports"], one["step"], strict=True)
            cells = " | ".join(f"{value:.1f}" for size in sizes for value in size)
            first, second = one["beyond"]
            row = f"{one['per_row'] * 1e6:.0f} | {one['exponent']:.2f} | {one['far']:.0f}"
            print(
                f"| {one['subject']} | {one['start']} | {cells} | {first:.1f} → {second:.1f} | {row} |"
            )
    if lines := result.get("memory"):
        print(f"\nMemory of `run`, MiB: {small} → {large} rows\n")
        print(
            f"| {args.kind} | start | private, peak | private, first step | bytes a row, peak | first step "
            f"| shared | mapped data | all processes, peak | private, {FAR:,} rows [est] |\n"
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
        )
        for one in lines:
            cells = [
                _two(one["private_peak"]), _two(one["private_at_step"]),
                f"{one['per_row']:,.0f}", f"{one['per_row_at_step']:,.0f}",
                _two(one["shared_at_step"]), _two(one["data_mapped"]), _two(one["all"]), _mib(one["far"]),
            ]  # fmt: skip
            print(f"| {one['process']} | {one['start']} | {' | '.join(cells)} |")
    if reads := result.get("reads"):
        print(
            f"\nThe source ({reads['rows']:,} rows) was read {reads['all']:.2f} times in a run of 3 rounds "
            f"on 2 processes: {reads['digests']:.2f} for digests, {reads['other']:.2f} for rows; "
            f"{reads['opens']} opens."
        )
    print("\n| bar | value | limit | |\n|---|--:|--:|---|")
    for name, value, limit in bars(args, result):
        print(f"| {name} | {value:.2f} | {limit:g} | {'pass' if value <= limit else 'FAIL'} |")


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f}"


def _two(values: list[float]) -> str:
    return " → ".join(map(_mib, values))


def run(args: argparse.Namespace, folder: Path) -> None:
    """Measure the requested parts, print the tables, and append the record."""
    bench = Bench(args, folder)
    result: _Figures = {}
    single = bench.cpu() if "cpu" in args.parts else {}
    double = bench.memory() if "memory" in args.parts else {}
    if single:
        result["cpu"] = cpu_lines(args.rows, single)
    if single or double:
        result["memory"] = memory_lines(args.rows, single, double)
    if "reads" in args.parts:
        result["reads"] = bench.reads()
    show(args, result)
    checked = {name: [value, limit] for name, value, limit in bars(args, result)}
    record.append(args, kind=args.kind, rows=args.rows, bars=checked, **result)


if __name__ == "__main__":
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        run(given, (given.folder or Path(made)).resolve())
