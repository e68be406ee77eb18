"""Runs the stages of a recipe in order; a stopped run resumes."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rpo_trainer.chain.callbacks import MetricsLog
from rpo_trainer.chain.card import write_card
from rpo_trainer.chain.changes import with_rounds
from rpo_trainer.chain.check import check_recipe
from rpo_trainer.chain.data_log import DataLog
from rpo_trainer.chain.evaluation import Evaluation
from rpo_trainer.chain.finished import check_finished, check_starts
from rpo_trainer.chain.input_files import Digests, InputFiles
from rpo_trainer.chain.models import Models
from rpo_trainer.chain.outputs import output_record, remove_exact, write_output
from rpo_trainer.chain.progress import ChainProgress
from rpo_trainer.chain.run_dir import ReplacedRun, locked, open_run_dir
from rpo_trainer.chain.same_examples import check_same_examples
from rpo_trainer.chain.selection import default_run_dir
from rpo_trainer.chain.state import ChainState, forget_metrics, now, plain, write_recipe
from rpo_trainer.chain.stop_signal import StopOnSignal
from rpo_trainer.chain.system import system_record
from rpo_trainer.chain.time_left import TimeLeft
from rpo_trainer.chain.training import (
    agreement_of,
    light_collections,
    train_stage,
    write_gaps,
)
from rpo_trainer.errors import RunError, StepZeroError, StoppedBySignal
from rpo_trainer.plan.disk import check_disk, raise_if_refused
from rpo_trainer.recipe import LoadedRecipe, Stage, dump_resolved, fill_from_environment
from rpo_trainer.runtime import distributed
from rpo_trainer.runtime.cores import OtherProcesses, limit_threads
from rpo_trainer.runtime.devices import empty_cache, has_accelerator
from rpo_trainer.runtime.row_progress import duration
from rpo_trainer.stages.error_places import errors_located_in
from rpo_trainer.stages.hub import push_output
from rpo_trainer.stages.inputs import StageInputs
from rpo_trainer.stages.output_dtype import needs_exact
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.record import (
    METRICS_FILE,
    AuditRecord,
    CalibrationBin,
    DataRecord,
    HubRecord,
    StageRecord,
    StepZeroRecord,
)
from rpo_trainer.stages.scored_rows import ScoredRows
from rpo_trainer.stages.settings import arithmetic, check_warmup, make_trainer
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.manifest import verify_manifest
from rpo_trainer.trainers.preference import PreferenceTrainer
from rpo_trainer.trainers.reward import RewardTrainer

logger = logging.getLogger(__name__)


def run_chain(
    loaded: LoadedRecipe,
    run_dir: Path | None = None,
    *,
    only: Collection[str] | None = None,
    allow_changed: Collection[str] = (),
    overwrite: bool = False,
    verify: bool = False,
) -> Path:
    """Run the stages that are not finished. Called again, resumes where the run stopped.

    Args:
        loaded: a recipe from `load_recipe`.
        run_dir: the run directory; None: `default_run_dir`.
        only: names of the stages to run; None: all.
        allow_changed: keys of the recipe that may differ from those the run was computed with; the
            changes are recorded in chain.json.
        overwrite: start from the beginning, and delete the run in the directory once the new one has
            passed its checks.
        verify: read the content of all inputs, outputs and checkpoints; False: of those whose size or
            modification time differs from the recorded one.

    Returns:
        The run directory.

    Raises:
        RPOTrainerError: an error in the recipe, data or environment; wherever possible, raised before
            the first stage.
        StoppedBySignal: after SIGTERM or SIGINT, with a complete checkpoint on disk.
    """
    run_dir = default_run_dir(loaded) if run_dir is None else run_dir
    distributed.start()
    limit_threads()
    replaced: list[ReplacedRun] = []
    with ExitStack() as held:

        def hold() -> None:
            if overwrite:
                replaced.append(ReplacedRun(run_dir))
                held.callback(replaced[0].put_back)
            new = open_run_dir(run_dir)
            held.enter_context(locked(run_dir, new=new))

        with distributed.raise_on_all_ranks():
            if distributed.is_main():
                hold()
        with distributed.raise_on_all_ranks():
            chain = _Chain(loaded, run_dir, allow_changed, replaced, verify)
        try:
            return chain.run(only)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise_if_refused(error, run_dir)
            raise


class _Chain:
    def __init__(
        self,
        loaded: LoadedRecipe,
        run_dir: Path,
        allow_changed: Collection[str] = (),
        replaced: Sequence[ReplacedRun] = (),
        verify: bool = False,
    ) -> None:
        self.loaded = loaded
        self.verify = verify
        self.replaced = replaced
        self.run_dir = run_dir
        self.preparer = StagePreparer(loaded, run_dir)
        self.recipe, self.stages = self.preparer.recipe, self.preparer.stages
        self.state = ChainState(run_dir)
        allowed = with_rounds(allow_changed, loaded.recipe.stages)
        self.state.adopt(*plain(loaded.recipe, self.stages, loaded.base_dir), allowed=allowed)
        with errors_located_in(loaded.origins):
            self.models = Models(self.preparer, run_dir, verify=verify)
        self.scored_rows = ScoredRows(self.preparer, run_dir, self.models, distributed.ALL_RANKS)
        self.evaluation = Evaluation(self.preparer, run_dir, self.models, self.scored_rows)
        self.inputs = InputFiles(self.recipe, self.stages, loaded.base_dir)
        self.digests = Digests()
        self.stop = StopOnSignal()
        self.time_left = TimeLeft(self.stages, self.preparer.steps)
        self.progress = ChainProgress(len(self.stages), self.time_left)
        self.data_log = DataLog()
        self.others = OtherProcesses()
        self.started = time.time()

    def run(self, only: Collection[str] | None) -> Path:
        def finished() -> None:
            check_finished(
                self.preparer, self.state, self.inputs, run_dir=self.run_dir, verify=self.verify
            )

        distributed.on_main(finished)
        wanted = [
            (stage, record)
            for stage in self.stages
            if (record := self._record(stage.name)).state != "done"
            and (only is None or stage.name in only)
        ]
        if not wanted:
            if self.state.allowed:
                self._save()  # the allowed changes
            logger.info("all stages in %s are finished; --overwrite starts over", self.run_dir)
            return self.run_dir
        pending = {stage.name for stage, record in wanted if record.state == "pending"}
        check_starts(
            [stage for stage, _ in wanted], self.stages, self.recipe, self.state, self.run_dir
        )

        def begin() -> None:
            # All stages are checked before the first one trains, so that an error in the last one is
            # found at once. Their data are prepared here and then found in the store.
            if pending:
                first, record = wanted[0]
                if first.name in pending:
                    record.inputs = self.digests.of(self.inputs.of(first))
                check_recipe(self.loaded, self.run_dir, only=pending, preparer=self.preparer)
            if len(pending) < len(wanted):
                check_disk(self.preparer, self.run_dir, [stage for stage, _ in wanted], {})
            for run in self.replaced:
                run.delete()
            self.state.save()
            write_recipe(self.run_dir, dump_resolved(self.recipe))

        for record in self.state.stages:
            if record.state == "done" or all(record is not one for _, one in wanted):
                self.time_left.end(record.name, steps=record.steps, seconds=record.seconds)
        with self.stop.installed(), self.progress.shown():
            self._start_engines([stage for stage, _ in wanted])
            distributed.on_main(begin, timeout=distributed.LONG_TIMEOUT)
            if distributed.is_main() and not has_accelerator():
                self.others.report()
            for stage, record in wanted:
                with (
                    light_collections(),
                    errors_located_in(self.loaded.origins, f"stages.{stage.name}"),
                ):
                    self._run_stage(stage, record)
        return self.run_dir

    def _start_engines(self, stages: list[Stage]) -> None:
        """Create the training arguments on every rank: DeepSpeed starts its process group there."""
        if distributed.world_size() == 1:
            return
        with distributed.raise_on_all_ranks():
            for stage in stages:
                self.preparer.settings(stage, self.run_dir)

    def _record(self, name: str) -> StageRecord:
        record = self.state.stage(name)
        assert record is not None  # adopted
        return record

    def _final(self, name: str) -> Path:
        return self.run_dir / name / "final"

    def _save(self) -> None:
        if distributed.is_main():
            self.state.save()

    # --- one stage ---

    def _run_stage(self, stage: Stage, record: StageRecord) -> None:
        self.progress.begin(self.preparer.number(stage), stage.name)
        with self._timed(record):
            self._keep_digests(stage, record)
            if not self._is_trained(stage, record):
                self._train(stage, record, self._prepare(stage, record))
            self.progress.phase("evaluating")
            self._evaluate(stage, record)
            self._publish(stage, record)
        self._finish(stage, record)

    @contextmanager
    def _timed(self, record: StageRecord) -> Iterator[None]:
        """Add the time spent inside to the record, which sums over all starts of the run."""
        began, before = time.monotonic(), record.seconds or 0.0
        try:
            yield
        except StoppedBySignal:
            record.seconds = before + time.monotonic() - began
            self._save()
            raise
        record.seconds = before + time.monotonic() - began

    def _keep_digests(self, stage: Stage, record: StageRecord) -> None:
        """Record digests of the inputs before the stage reads them, so that later changes are detected."""
        (self.run_dir / stage.name).mkdir(exist_ok=True)
        if record.state == "pending":
            record.inputs = distributed.on_main(
                lambda: record.inputs or self.digests.of(self.inputs.of(stage))
            )

    def _is_trained(self, stage: Stage, record: StageRecord) -> bool:
        final = self._final(stage.name)
        fault = distributed.on_main(lambda: verify_manifest(final, content=self.verify))
        return fault is None and record.steps is not None

    def _finish(self, stage: Stage, record: StageRecord) -> None:
        record.state = "done"
        record.finished = now()
        self._save()
        distributed.on_main(lambda: remove_exact(self.preparer, self.state, self.run_dir))
        distributed.on_main(lambda: self.preparer.store.collect(self.started))
        took = duration(record.seconds or 0.0)
        logger.info("%s finished in %s", self.preparer.label(stage), took)
        self.time_left.end(stage.name, steps=record.steps, seconds=record.seconds)

    def _publish(self, stage: Stage, record: StageRecord) -> None:
        """Write the model card, and push the output to the hub if `push_to_hub` is set."""
        final = self._final(stage.name)
        record.output = output_record(final)
        records = {each.name: each for each in self.state.stages}
        arguments = fill_from_environment(
            stage.training_args, where=f"stages.{stage.name}.training_args"
        )

        def publish() -> dict[str, Any] | None:
            write_card(final, stage, self.stages, records, self.recipe, self.loaded.base_dir)
            return push_output(final, arguments, stage=stage.name, run=self.run_dir.resolve().name)

        if (pushed := distributed.on_main(publish)) is not None:
            record.hub = HubRecord.from_json(pushed)

    def _train(self, stage: Stage, record: StageRecord, inputs: StageInputs) -> None:
        folder = self.run_dir / stage.name
        trainer = self._trainer(inputs)
        record.system = system_record(trainer, arithmetic(self.recipe.model))

        def begin(step: int, evaluated: bool) -> None:
            if step >= 0:
                logger.info("%s resuming from step %d", self.preparer.label(stage), step)
            record.skipped = None  # the checkpoint has those before it
            if distributed.is_main():
                forget_metrics(self.run_dir / METRICS_FILE, stage.name, step, evaluated=evaluated)

        self.progress.phase("reference log-probs" if stage.needs_reference else "starting")
        try:
            finished = train_stage(
                trainer, folder, begin=begin, record=record, save=self._save, verify=self.verify
            )
        except StepZeroError as error:
            record.step0 = StepZeroRecord(**error.values, ok=False, why=error.why)
            self._save()
            raise
        if not finished:
            self.stop.raise_if_stopped()
            raise RunError(
                f"the training of stage {stage.name} ended before its last step",
                code="training.ended-early",
                where=str(folder),
                why="a callback may have set `should_training_stop`",
                fix="run the same command again: it resumes from the last checkpoint",
            )
        if isinstance(trainer, PreferenceTrainer):
            write_gaps(trainer, folder / "gaps.jsonl")
        if stage.peft is None:
            dtype, keep = self.models.delivered_dtype(stage), needs_exact(self.preparer, stage)
            write_output(trainer, folder, dtype, keep_exact=keep)
        else:
            self.models.write_output(trainer, stage)
        if isinstance(trainer, RewardTrainer):
            record.calibration = {
                name: [CalibrationBin.from_json(row) for row in table]
                for name, table in trainer.calibration.get("eval", {}).items()
            }
        record.steps = trainer.state.global_step
        self._save()
        self.stop.output_written()
        del trainer
        gc.collect()
        empty_cache()

    def _trainer(self, inputs: StageInputs) -> BaseTrainer:
        stage, label = inputs.stage, self.preparer.label(inputs.stage)
        assert inputs.train is not None
        with distributed.raise_on_all_ranks():
            # The number of sampled examples is known only now.
            check_warmup(stage, len(inputs.train))
            config = self.preparer.settings(stage, self.run_dir)
        self.progress.phase("loading model")
        reference = self.models.reference(stage)
        trainer = make_trainer(
            stage,
            config,
            self.models.start(stage),
            reference,
            self.preparer.tokenizer,
            inputs,
            [
                MetricsLog(self.run_dir / METRICS_FILE, stage.name),
                self.progress.callback(label),
                self.stop,
            ],
        )
        logger.info("%s training on %d examples", label, len(inputs.train))
        return trainer

    def _prepare(self, stage: Stage, record: StageRecord) -> StageInputs:
        label = self.preparer.label(stage)
        logger.info("%s preparing data", label)
        scored = self.scored_rows.rows(stage)
        key, digests = distributed.on_main(
            lambda: (self.preparer.build(stage, scored), self.preparer.digests.found),
            timeout=distributed.LONG_TIMEOUT,
        )
        self.preparer.digests.found |= digests
        with distributed.raise_on_all_ranks():
            inputs = self.preparer.open(stage, key, scored)
        audit, held_out, train = inputs.audit, inputs.held_out, inputs.train
        assert train is not None
        self.data_log.log(stage, audit, held_out.audit if held_out is not None else None, label)
        fingerprint = inputs.fingerprint
        check_same_examples(stage, fingerprint, record, self.state)
        sources = distributed.on_main(lambda: self.preparer.digests.local(stage.data.train))
        record.state = "running"
        record.started = record.started or now()
        record.examples = len(train)
        record.sources = sources
        record.data = DataRecord(
            fingerprint,
            AuditRecord.from_json(audit.as_dict()),
            AuditRecord.from_json(held_out.audit.as_dict()) if held_out else None,
        )
        if audit.calibration:
            record.reward_scale = audit.calibration["reward_scale"]
        self._save()
        return inputs

    def _evaluate(self, stage: Stage, record: StageRecord) -> None:
        """Record the loss on the stage's held-out rows, and the metrics of the recipe's `eval`."""
        if stage.trains_reward_model:
            record.eval = agreement_of(record)
            return
        scores = self.evaluation.measure(stage, self.preparer.label(stage))
        if record.eval_after is not None and stage.kind == "sft":
            scores.nll = record.eval_after.get("eval_loss/sft")
            scores.nll_before = (record.eval_before or {}).get("eval_loss/sft")
        record.eval = scores
