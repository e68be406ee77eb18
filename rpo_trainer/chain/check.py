"""Everything that can be known before training: arguments, data, tokenizer and template, disk."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from rpo_trainer.chain.data import (
    build_evaluation,
    build_rows,
    evaluation_prompts,
    needs_policy,
    stage_seed,
    tokenize_stage,
)
from rpo_trainer.chain.stage import lora_config, training_config
from rpo_trainer.data import Audit, encode_prompt, load_rows
from rpo_trainer.data.rows import RowError
from rpo_trainer.errors import DataError, ModelError, Problems, RPOTrainerError, RunError
from rpo_trainer.loading import load_tokenizer
from rpo_trainer.recipe import LoadedRecipe, PreferenceStage, Stage, expand_stages, resolve_path
from rpo_trainer.rewards.verifiers import get_verifier, require_ground_truth

if TYPE_CHECKING:
    from rpo_trainer.recipe import EvalSpec

_LOW_DISK = 2**30


def check_recipe(
    loaded: LoadedRecipe, run_dir: Path, *, only: Collection[str] | None = None
) -> list[str]:
    """Reads and tokenises the data of every stage, without a model.

    Args:
        only: names of the stages to check; None: all.

    Returns:
        Lines to show: what each stage will train on.

    Raises:
        Problems: all errors that were found.
    """
    check = _Check(loaded, run_dir)
    for stage in check.stages:
        if only is None or stage.name in only:
            check.stage(stage)
    free = shutil.disk_usage(_existing(run_dir)).free
    if free < _LOW_DISK:
        check.problems.append(
            RunError(f"only {free / 2**20:.0f} MiB of disk are free", where=str(run_dir))
        )
    if check.problems:
        raise Problems(_distinct(check.problems))
    return check.lines


class _Check:
    def __init__(self, loaded: LoadedRecipe, run_dir: Path) -> None:
        self.recipe = loaded.recipe
        self.base_dir = loaded.base_dir
        self.run_dir = run_dir
        self.stages = expand_stages(loaded.recipe)
        self.problems: list[RPOTrainerError] = []
        self.lines: list[str] = []
        self.tokenizer: PreTrainedTokenizerBase | None = None
        with _Collected(self.problems):
            self.tokenizer = load_tokenizer(loaded.recipe.model, loaded.base_dir)

    def stage(self, stage: Stage) -> None:
        """Its arguments, its start, its data and its evaluation, each for itself."""
        self.lines.append(f"{stage.name} ({stage.kind})")
        seed = stage_seed(stage, self.recipe)
        with _Collected(self.problems):
            training_config(
                stage, self.recipe.model, seed=seed, folder=self.run_dir / stage.name,
                run_dir=self.run_dir,
            )  # fmt: skip
        with _Collected(self.problems):
            lora_config(stage)
        for key, source in _sources(stage):
            with _Collected(self.problems):
                self._start(stage, key, source)
        with _Collected(self.problems):
            if needs_policy(stage.data):
                self._prompts(stage, seed)
            else:
                self._examples(stage, seed)
        spec = stage.eval or self.recipe.eval
        if spec is not None:
            with _Collected(self.problems):
                self._evaluation(spec)

    def _start(self, stage: Stage, key: str, source: str) -> None:
        if source == "model" or any(source == other.name for other in self.stages):
            return
        folder = resolve_path(self.base_dir, source)
        if not (folder / "config.json").is_file():
            raise ModelError("there is no model here", where=f"stages.{stage.name}.{key}: {folder}")

    def _examples(self, stage: Stage, seed: int) -> None:
        audit = Audit()
        rows = build_rows(stage, self.base_dir, seed=seed, audit=audit, earlier=self._rows_of)
        held_out = None
        if self.tokenizer is not None:
            examples = tokenize_stage(stage, rows, self.tokenizer, audit)
            self.lines.append(f"  {len(examples)} examples, {_steps(stage, len(examples))} steps")
            held_out = build_evaluation(stage, self.base_dir, self.tokenizer, seed=seed)
        if held_out is not None:
            audit.check_overlap(rows, held_out[1])
            self.lines.append(f"  {len(held_out[0])} held-out examples")
        self.lines += [f"  {line}" for line in audit.summary_lines()]

    def _rows_of(self, name: str) -> list[dict[str, Any]]:
        stage = next(stage for stage in self.stages if stage.name == name)
        return build_rows(
            stage, self.base_dir, seed=stage_seed(stage, self.recipe), audit=Audit(),
            earlier=self._rows_of,
        )  # fmt: skip

    def _prompts(self, stage: Stage, seed: int) -> None:
        rows = load_rows(
            stage.data.train, kind="prompt", base_dir=self.base_dir, audit=Audit(), seed=seed
        )
        assert stage.data.score is not None  # the schema
        require_ground_truth(rows, get_verifier(stage.data.score.verifier))
        for row in rows if self.tokenizer is not None else ():
            try:
                encode_prompt(self.tokenizer, row["prompt"], row.get("tools"))  # type: ignore[arg-type]
            except RowError as error:
                raise DataError(
                    str(error), where=f"stages.{stage.name}: row {row['id']}"
                ) from error
        self.lines.append(f"  {len(rows)} prompts; the responses come from {stage.init}")

    def _evaluation(self, spec: EvalSpec) -> None:
        rows = evaluation_prompts(spec, self.base_dir, seed=self.recipe.seed)
        if spec.score is not None:
            require_ground_truth(rows, get_verifier(spec.score.verifier))


class _Collected:
    """Errors raised inside go to a list."""

    def __init__(self, problems: list[RPOTrainerError]) -> None:
        self.problems = problems

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Problems):
            self.problems += error.problems
        elif isinstance(error, RPOTrainerError):
            self.problems.append(error)
        return isinstance(error, RPOTrainerError)


def _sources(stage: Stage) -> Iterator[tuple[str, str]]:
    yield "init", stage.init
    if isinstance(stage, PreferenceStage):
        yield "reference", stage.reference


def _steps(stage: Stage, examples: int) -> int:
    if stage.max_steps is not None:
        return stage.max_steps
    per_epoch = -(-examples // stage.global_batch_size)
    return int(-(-per_epoch * (stage.num_train_epochs or 1.0) // 1))


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _distinct(problems: list[RPOTrainerError]) -> list[RPOTrainerError]:
    """The rounds of a repeated stage find the same faults."""
    return list({str(problem): problem for problem in problems}.values())
