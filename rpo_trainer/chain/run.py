"""The stages of a recipe as a resumable state machine."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import time
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_trainer import distributed
from rpo_trainer.chain.callbacks import MetricsLog, StageProgress, StopOnSignal
from rpo_trainer.chain.check import check_recipe
from rpo_trainer.chain.data import (
    StageData,
    build_evaluation,
    build_rows,
    evaluation_prompts,
    fitted_stage,
    set_aside,
    source_digests,
    stage_seed,
    tokenize_stage,
)
from rpo_trainer.chain.made import RowMaker, source_key, sources_of_rows
from rpo_trainer.chain.models import Models
from rpo_trainer.chain.stage import (
    agreement_of,
    arithmetic,
    make_trainer,
    output_fingerprint,
    train_stage,
    training_config,
    write_gaps,
    write_output,
)
from rpo_trainer.chain.state import (
    METRICS_FILE,
    ChainState,
    forget_metrics,
    locked,
    open_run_dir,
    write_whole,
)
from rpo_trainer.data import Audit
from rpo_trainer.errors import RecipeError, RunError
from rpo_trainer.loading import load_tokenizer
from rpo_trainer.recipe import (
    LoadedRecipe,
    PreferenceStage,
    RewardStage,
    Stage,
    dump_resolved,
    expand_stages,
    resolve_path,
)
from rpo_trainer.rewards.rowfile import content_key
from rpo_trainer.sharding import loading_whole
from rpo_trainer.trainers.checkpoint import damage
from rpo_trainer.trainers.preference import PreferenceTrainer
from rpo_trainer.trainers.reward import RewardTrainer

logger = logging.getLogger(__name__)

_VERSIONS = ("rpo-trainer", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed")


def default_run_dir(loaded: LoadedRecipe) -> Path:
    """`run_dir` of the recipe, else `runs/` and the recipe's folder or file name."""
    if loaded.recipe.run_dir is not None:
        return Path(loaded.recipe.run_dir).expanduser()
    name = loaded.path.stem if loaded.path.stem != "chain" else loaded.base_dir.name
    return Path("runs") / name


def run_chain(
    loaded: LoadedRecipe, run_dir: Path | None = None, *, only: Collection[str] | None = None
) -> Path:
    """Runs the stages that are not finished; run again, it goes on where it stopped.

    Args:
        loaded: a recipe of `load_recipe`.
        run_dir: where to; None: `default_run_dir`.
        only: names of the stages to run, the others are left as they are; None: all.

    Returns:
        The run directory.

    Raises:
        RPOTrainerError: what is wrong; all that can be known, before the first stage.
        StoppedBySignal: by SIGTERM or SIGINT, behind a complete checkpoint.
    """
    run_dir = default_run_dir(loaded) if run_dir is None else run_dir
    distributed.start()
    with ExitStack() as held:

        def hold() -> None:
            open_run_dir(run_dir)
            held.enter_context(locked(run_dir))

        with distributed.together():
            if distributed.is_main():
                hold()
        with distributed.together():
            chain = _Chain(loaded, run_dir)
        return chain.run(only)


class _Chain:
    def __init__(self, loaded: LoadedRecipe, run_dir: Path) -> None:
        self.loaded = loaded
        self.recipe = loaded.recipe
        self.base_dir = loaded.base_dir
        self.run_dir = run_dir
        self.stages = expand_stages(loaded.recipe)
        self.state = ChainState(run_dir)
        self.state.adopt(
            [stage.model_dump(mode="json") for stage in self.stages],
            loaded.recipe.model.model_dump(mode="json"),
            loaded.recipe.seed,
        )
        self.tokenizer = load_tokenizer(loaded.recipe.model, loaded.base_dir)
        self.models = Models(
            self.recipe, self.base_dir, run_dir, self.stages,
            vocabulary=len(self.tokenizer), arithmetic=arithmetic(self.recipe.model),
        )  # fmt: skip
        self.maker = RowMaker(
            self.base_dir, run_dir, {stage.name: stage for stage in self.stages},
            seed=lambda stage: stage_seed(stage, self.recipe), policy=self._policy,
            weights=self._weights, ranks=distributed,
        )  # fmt: skip
        self.stop = StopOnSignal()

    def run(self, only: Collection[str] | None) -> Path:
        distributed.on_main(self._check_finished)
        wanted = [
            (stage, record)
            for stage in self.stages
            if (record := self._record(stage.name))["state"] != "done"
            and (only is None or stage.name in only)
        ]
        if not wanted:
            logger.info("done: there is nothing left to run in %s", self.run_dir)
            return self.run_dir
        pending = {stage.name for stage, record in wanted if record["state"] == "pending"}
        self._check_starts(wanted)

        def begin() -> None:
            if len(pending) == len(wanted):  # a fault of the last stage must not wait for the first
                check_recipe(self.loaded, self.run_dir, only=pending)
            self.state.save()
            _write_recipe(self.run_dir / "recipe.yaml", dump_resolved(self.recipe))

        with self.stop.installed():
            self._start_engines([stage for stage, _ in wanted])
            distributed.on_main(begin)
            for stage, record in wanted:
                self._run_stage(stage, record)
        return self.run_dir

    def _start_engines(self, stages: list[Stage]) -> None:
        """DeepSpeed joins its processes when arguments are made for it: all must make them."""
        if distributed.world_size() == 1:
            return
        with distributed.together():
            for stage in stages:
                training_config(
                    stage, self.recipe.model, seed=stage_seed(stage, self.recipe),
                    folder=self.run_dir / stage.name, run_dir=self.run_dir,
                )  # fmt: skip

    def _record(self, name: str) -> dict[str, Any]:
        record = self.state.stage(name)
        assert record is not None  # adopted
        return record

    def _check_finished(self) -> None:
        """Finished stages must still be what they were, their data files too."""
        for stage in self.stages:
            record = self._record(stage.name)
            if record["state"] == "pending":
                continue
            changed = {
                name: digest
                for name, digest in source_digests(stage.data.train, self.base_dir).items()
                if record.get("sources", {}).get(name, digest) != digest
            }
            if changed:
                raise RunError(
                    f"the data has changed since stage {stage.name} began: {', '.join(changed)}",
                    where=str(self.run_dir),
                    why="a run goes on only with the data it began with",
                    fix="restore the files, or start in a new directory (--run-dir)",
                )
            if record["state"] == "done":
                self._check_output(stage.name, record)

    def _check_output(self, name: str, record: dict[str, Any]) -> None:
        final = self._final(name)
        base = final.with_name("base")
        fault = damage(final)
        if fault is None and base.is_dir() and (fault := damage(base)) is not None:
            fault = f"base: {fault}"
        if fault is None and output_fingerprint(final) != record["output"]["fingerprint"]:
            fault = "these are other weights than the stage has written"
        if fault is not None:
            raise RunError(
                f"the output of the finished stage {name} is damaged: {fault}",
                where=str(final),
                why="later stages start from it",
                fix="restore it from a copy, or start in a new directory (--run-dir)",
            )

    def _check_starts(self, wanted: list[tuple[Stage, dict[str, Any]]]) -> None:
        """Every stage that a wanted one starts from is finished, or will be."""
        there = {stage.name for stage, _ in wanted}
        for stage, _ in wanted:
            sources = {"init": stage.init}
            if isinstance(stage, PreferenceStage):
                sources["reference"] = stage.reference
            sources |= sources_of_rows(stage.data)
            for field, source in sources.items():
                record = self.state.stage(source)
                if record is not None and record["state"] != "done" and source not in there:
                    raise RunError(
                        f"the {field} of stage {stage.name} is stage {source}, "
                        "which is not finished",
                        where=str(self.run_dir),
                        fix=f"run the whole chain first (rpo-trainer run), or set "
                        f"stages.{stage.name}.{field} to model or a path",
                    )

    def _final(self, name: str) -> Path:
        return self.run_dir / name / "final"

    # --- models ---

    def _policy(self, stage: Stage, source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """What a stage samples from: its start (`init`), or another source."""
        with loading_whole():
            if source != "init":
                return self.models.output(source).to(distributed.device()), self.tokenizer
            # A reward stage trains something else: the pairs come from what it is made of.
            model = (
                self.models.output(stage.init)
                if isinstance(stage, RewardStage)
                else self.models.start(stage, stage_seed(stage, self.recipe))
            )
        return model.to(distributed.device()), self.tokenizer

    def _weights(self, stage: Stage, source: str) -> str:
        """A key of the weights behind such a source."""
        source = stage.init if source == "init" else source
        if source == "model":
            name = self.recipe.model.name_or_path
            own = source_key(resolve_path(self.base_dir, name), name) if name else ""
            return content_key(self.recipe.model.model_dump(mode="json"), self.recipe.seed, own)
        if self.state.stage(source) is not None:
            return output_fingerprint(self._final(source))
        return source_key(resolve_path(self.base_dir, source), source)

    def _save(self) -> None:
        if distributed.is_main():
            self.state.save()

    # --- one stage ---

    def _run_stage(self, stage: Stage, record: dict[str, Any]) -> None:
        began = time.monotonic()
        folder = self.run_dir / stage.name
        folder.mkdir(exist_ok=True)
        fault = distributed.on_main(lambda: damage(self._final(stage.name)))
        if fault is not None or "steps" not in record:
            self._train(stage, record, folder, stage_seed(stage, self.recipe))
        self._evaluate(stage, record, folder)
        record["state"] = "done"
        record["finished"] = _now()
        record["seconds"] = record.get("seconds", 0.0) + time.monotonic() - began
        record["output"] = {"fingerprint": output_fingerprint(self._final(stage.name))}
        self._save()
        logger.info("%s finished", self._label(stage))

    def _label(self, stage: Stage) -> str:
        return f"[{self.stages.index(stage) + 1}/{len(self.stages)} {stage.name}]"

    def _train(self, stage: Stage, record: dict[str, Any], folder: Path, seed: int) -> None:
        label = self._label(stage)
        logger.info("%s preparing data", label)
        data = self._data(stage, record, seed)
        stage = fitted_stage(stage, data.audit)
        with distributed.together():
            config = training_config(
                stage, self.recipe.model, seed=seed, folder=folder, run_dir=self.run_dir
            )
        reference = None
        if isinstance(stage, PreferenceStage) and stage.reference != stage.init:
            reference = self.models.output(stage.reference)
        trainer = make_trainer(
            stage,
            config,
            self.models.start(stage, seed),
            reference,
            self.tokenizer,
            data,
            [
                MetricsLog(self.run_dir / METRICS_FILE, stage.name),
                StageProgress(label),
                self.stop,
            ],
        )
        logger.info("%s training on %d examples", label, len(data.train))

        def begin(step: int, evaluated: bool) -> None:
            if distributed.is_main():
                forget_metrics(self.run_dir / METRICS_FILE, stage.name, step, evaluated=evaluated)

        def note(values: dict[str, Any]) -> None:
            record.update(values)
            self._save()

        results = train_stage(trainer, folder, begin=begin, note=note)
        if results is None:
            self.stop.raise_if_stopped()
            raise RunError(f"the training of stage {stage.name} ended before its last step")
        if isinstance(trainer, PreferenceTrainer):
            write_gaps(trainer, folder / "gaps.jsonl")
        if stage.peft is None:
            write_output(trainer, folder)
        else:
            self.models.write_output(trainer, stage)
        if isinstance(trainer, RewardTrainer):
            results["calibration"] = trainer.calibration.get("eval", {})
        note(results)
        self.stop.output_written()
        del trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _data(self, stage: Stage, record: dict[str, Any], seed: int) -> StageData:
        audit = Audit()
        made = self.maker.rows(stage, audit)
        with distributed.together():
            rows = build_rows(
                stage, self.base_dir, seed=seed, audit=audit, earlier=self._earlier_rows, made=made
            )
            rows, held = set_aside(stage, rows, seed=seed)
            train = tokenize_stage(stage, rows, self.tokenizer, audit)
            held_out = build_evaluation(stage, self.base_dir, self.tokenizer, seed=seed, rows=held)
            if held_out is not None:
                audit.check_overlap(rows, held_out[1], held_out=stage.data.held_out)
        for line in audit.summary_lines():
            logger.info("%s data: %s", self._label(stage), line)
        data = StageData(train, held_out[0] if held_out else None, audit, rows)
        fingerprint = data.fingerprint()
        made_here = distributed.merge({distributed.rank(): fingerprint})
        with distributed.together():
            if len(set(made_here.values())) > 1:
                raise RunError(
                    f"the processes have made different examples of stage {stage.name}",
                    why="each reads the data for itself, and the hosts do not have the same files",
                    fix="give every host the same data, tokenizer and library versions",
                )
            known = record.get("data", {}).get("fingerprint", fingerprint)
            if known != fingerprint:
                raise RunError(
                    f"the examples of stage {stage.name} are not those it began with",
                    where=str(self.run_dir),
                    why="a data source, the tokenizer or its template has changed",
                    fix="undo the change, or start in a new directory (--run-dir)",
                )
        record.update(
            state="running",
            started=record.get("started") or _now(),
            examples=len(train),
            sources=source_digests(stage.data.train, self.base_dir),
            data={"fingerprint": fingerprint, "audit": audit.as_dict()},
        )
        if audit.calibration:
            record["reward_scale"] = audit.calibration["reward_scale"]
        self._save()
        return data

    def _earlier_rows(self, name: str) -> list[dict[str, Any]]:
        stage = next(stage for stage in self.stages if stage.name == name)
        seed = stage_seed(stage, self.recipe)
        return build_rows(
            stage, self.base_dir, seed=seed, audit=Audit(), earlier=self._earlier_rows
        )

    def _evaluate(self, stage: Stage, record: dict[str, Any], folder: Path) -> None:
        """Held-out NLL or preferences, and sampled responses under the verifier."""
        if isinstance(stage, RewardStage):
            record["eval"] = agreement_of(record)
            return
        scores: dict[str, Any] = {}
        if "eval_after" in record:
            scores["nll"] = record["eval_after"].get("eval_loss/sft")
            scores["nll_before"] = record.get("eval_before", {}).get("eval_loss/sft")
        spec = stage.eval or self.recipe.eval
        if spec is not None and spec.generate is not None and spec.score is not None:
            assert spec.score.verifier is not None  # the schema
            from rpo_trainer.evaluate import evaluate_policy

            logger.info("%s sampling held-out responses", self._label(stage))
            with loading_whole():
                model = self.models.output(stage.name)
            result = evaluate_policy(
                model.to(distributed.device()),
                self.tokenizer,
                evaluation_prompts(spec, self.base_dir, seed=self.recipe.seed),
                generate=spec.generate,
                verifier=spec.score.verifier,
                allow_code_execution=spec.score.allow_code_execution,
                greedy=spec.greedy,
                seed=self.recipe.seed,
                shard=(distributed.rank(), distributed.world_size()),
                gather=distributed.merge,
            ).as_dict()
            samples = result.pop("samples")
            if distributed.is_main():
                lines = (json.dumps(sample) + "\n" for sample in samples)
                (folder / "samples.jsonl").write_text("".join(lines))
            scores |= result
        record["eval"] = scores


def select_stage(loaded: LoadedRecipe, kind: str, name: str | None) -> str:
    """The stage that `rpo-trainer sft | dpo | rpo | reward` means.

    Raises:
        RecipeError: there is none, or several and no name.
    """
    stages = [stage for stage in expand_stages(loaded.recipe) if stage.kind == kind]
    names = [stage.name for stage in stages]
    if not names:
        raise RecipeError(f"the recipe has no {kind} stage", where=str(loaded.path))
    if name is not None and name not in names:
        raise RecipeError(
            f"there is no {kind} stage {name!r}",
            where=str(loaded.path),
            fix=f"one of: {', '.join(names)}",
        )
    if name is None and len(names) > 1:
        raise RecipeError(
            f"the recipe has {len(names)} {kind} stages",
            where=str(loaded.path),
            fix=f"choose with --stage: {', '.join(names)}",
        )
    return name or names[0]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _write_recipe(path: Path, text: str) -> None:
    versions = []
    for name in _VERSIONS:
        try:
            versions.append(f"# {name} {importlib.metadata.version(name)}\n")
        except importlib.metadata.PackageNotFoundError:
            continue
    write_whole(path, "".join(versions) + text)
