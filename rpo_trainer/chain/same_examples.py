"""The examples of a stage must be the same on every process, and when a stage resumes."""

from __future__ import annotations

from rpo_trainer.chain.changes import data_changed
from rpo_trainer.chain.state import ChainState
from rpo_trainer.errors import RunError
from rpo_trainer.recipe import Stage
from rpo_trainer.runtime import distributed
from rpo_trainer.stages.record import StageRecord


def check_same_examples(
    stage: Stage, fingerprint: str, record: StageRecord, state: ChainState
) -> None:
    """Compare the fingerprint of a stage's examples between processes and with its record.

    Allowed changes are recorded in the history of the run. Called by all processes.

    Raises:
        RunError: the examples differ between processes, or have changed since the stage began.
    """
    prepared = distributed.all_gather_dict({distributed.rank(): fingerprint})
    with distributed.raise_on_all_ranks():
        if len(set(prepared.values())) > 1:
            raise RunError(
                f"the processes prepared different examples for stage {stage.name}",
                code="run.different-examples",
                why="each process reads the data itself, and the files differ between hosts",
                fix="use the same data, tokenizer and library versions on every host",
            )
        known = record.data.fingerprint if record.data is not None else None
        if known in (None, fingerprint):
            return
        if not state.allows_other_data(stage.name):
            raise data_changed(
                f"the examples of stage {stage.name} have changed since it began",
                stage.name,
                state.path.parent,
                why="a data source, the tokenizer or its chat template has changed",
                undo="undo the change",
            )
        state.note(f"stages.{stage.name}.data: examples", known, fingerprint)
