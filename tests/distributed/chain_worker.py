"""The command line in one rank of a run, with optional signals and faults (see `tests.chain.killer`).

    python -m tests.distributed.chain_worker FOLDER [RANK (SIGNAL POINT)... | RANK fault FAULT]

Runs FOLDER/recipe.yaml in FOLDER/run. Each rank writes its exit code to FOLDER/exit-RANK. RANK: a number, or
`all`. A signal is sent once, even if a later attempt reaches the point again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from tests.distributed import gloo


def fault(name: str) -> Any:
    """One rank finds the rows `missing` (an error) or `fewer`; its loss is `nan`; its forward `breaks`."""
    from rpo_trainer.errors import DataError
    from rpo_trainer.stages.inputs import StageInputs, dataset_fingerprint
    from rpo_trainer.stages.prepare import StagePreparer
    from rpo_trainer.trainers.base import BaseTrainer

    opened, outputs = StagePreparer.open, BaseTrainer.outputs

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise DataError("there is no such file on this host", code="data.not-found")

    def fewer(*args: Any, **kwargs: Any) -> StageInputs:
        inputs = opened(*args, **kwargs)
        assert inputs.train is not None
        train = inputs.train.select(range(1, len(inputs.train)))
        return replace(inputs, train=train, fingerprint=dataset_fingerprint(train))

    def nan(self: Any, *args: Any) -> Any:
        factor = float("nan") if self.model.training and self.state.global_step == 1 else 1.0
        return outputs(self, *args) * factor

    def breaks(self: Any, *args: Any) -> Any:
        if self.state.global_step == 1:
            raise RuntimeError("the device of this rank is broken")
        return outputs(self, *args)

    if name in ("missing", "fewer"):
        return mock.patch.object(StagePreparer, "open", missing if name == "missing" else fewer)
    return mock.patch.object(BaseTrainer, "outputs", nan if name == "nan" else breaks)


def signal_once(folder: Path, number: str, point: str) -> Any:
    from tests.chain import killer

    marker = folder / f"{killer.MARKER}-{point}-{os.environ.get('RANK', '0')}"

    def send() -> None:
        if not marker.exists():
            marker.write_text("")
            os.kill(os.getpid(), int(number))

    return killer.at(point, send)


def main(folder: Path, rank: str = "", *happens: str) -> None:
    if "WORLD_SIZE" in os.environ:
        gloo.allow()
    from rpo_trainer.cli.commands import main as command
    from rpo_trainer.runtime import distributed

    mine = os.environ.get("RANK", "0")
    leave = distributed.exit_at_once

    def leave_noted(code: int) -> NoReturn:
        (folder / f"exit-{mine}").write_text(str(code))
        leave(code)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(distributed, "exit_at_once", leave_noted))
        for what, where in zip(happens[::2], happens[1::2], strict=True):
            if rank in (mine, "all"):
                here = fault(where) if what == "fault" else signal_once(folder, what, where)
                stack.enter_context(here)
        try:
            command(["run", f"{folder}/recipe.yaml", "--run-dir", f"{folder}/run", "--no-report"])
        except SystemExit as ended:
            (folder / f"exit-{mine}").write_text(str(ended.code))
            raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
