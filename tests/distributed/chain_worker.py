"""The command line in one rank of a run, which may end itself at a point (see `tests.chain.killer`).

    python -m tests.distributed.chain_worker FOLDER [RANK SIGNAL POINT | RANK rows FAULT]

Runs FOLDER/recipe.yaml in FOLDER/run. Each rank leaves its exit code in FOLDER/exit-RANK. With `rows`, what
one rank reads is `missing` (an error) or `fewer` than what the others read.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed import gloo


def other_rows(fault: str) -> Any:
    from rpo_trainer.chain import data
    from rpo_trainer.errors import DataError

    own = data.load_rows

    def load_rows(*args: Any, **kwargs: Any) -> Any:
        if fault == "missing":
            raise DataError("there is no such file on this host")
        return own(*args, **kwargs)[1:]

    return mock.patch.object(data, "load_rows", load_rows)


def main(folder: Path, rank: str = "", number: str = "0", point: str = "") -> None:
    if "WORLD_SIZE" in os.environ:
        gloo.allow()
    from rpo_trainer.cli import main as command
    from tests.chain import killer

    mine, marker = os.environ.get("RANK", "0"), folder / killer.MARKER

    def signal_once() -> None:
        if not marker.exists():
            marker.write_text(point)
            os.kill(os.getpid(), int(number))

    here = contextlib.nullcontext()
    if mine == rank:
        here = other_rows(point) if number == "rows" else killer.at(point, signal_once)
    try:
        with here:
            command(["run", f"{folder}/recipe.yaml", "--run-dir", f"{folder}/run", "--no-report"])
    except SystemExit as ended:
        (folder / f"exit-{mine}").write_text(str(ended.code))
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
