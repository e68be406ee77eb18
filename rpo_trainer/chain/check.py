"""Everything that can be known before training: arguments, data, tokenizer and template, disk."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from rpo_trainer.adapters import base_of, is_adapter
from rpo_trainer.chain.data import (
    build_evaluation,
    build_rows,
    evaluation_prompts,
    needs_policy,
    set_aside,
    stage_seed,
    tokenize_stage,
)
from rpo_trainer.chain.made import load_given, load_prompts
from rpo_trainer.chain.stage import lora_config, training_config
from rpo_trainer.data import Audit, encode_prompt
from rpo_trainer.data.rows import RowError
from rpo_trainer.errors import DataError, ModelError, Problems, RPOTrainerError, RunError
from rpo_trainer.loading import check_context, load_config, load_tokenizer
from rpo_trainer.recipe import (
    LoadedRecipe,
    PreferenceStage,
    RewardStage,
    Stage,
    expand_stages,
    resolve_path,
)
from rpo_trainer.recipe.checks import looks_like_path
from rpo_trainer.rewards.scorers import make_scorer

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
        self.config: Any = None
        with _Collected(self.problems):
            self.tokenizer = load_tokenizer(loaded.recipe.model, loaded.base_dir)
            self.config = load_config(
                loaded.recipe.model, loaded.base_dir, None, len(self.tokenizer)
            )

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
            if self.config is not None:
                check_context(self.config, stage.max_length, f"stages.{stage.name}.max_length")
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
        if spec is not None and not isinstance(stage, RewardStage):
            with _Collected(self.problems):
                self._evaluation(spec)

    def _start(self, stage: Stage, key: str, source: str) -> None:
        if source == "model" or any(source == other.name for other in self.stages):
            return
        folder = resolve_path(self.base_dir, source)
        if is_adapter(folder):
            base_of(folder)
        elif not (folder / "config.json").is_file():
            raise ModelError("there is no model here", where=f"stages.{stage.name}.{key}: {folder}")

    def _examples(self, stage: Stage, seed: int) -> None:
        audit = Audit()
        if stage.data.score is not None:
            self._scorer(stage, load_given(stage.data, self.base_dir, seed=seed, audit=Audit()))
        rows = build_rows(stage, self.base_dir, seed=seed, audit=audit, earlier=self._rows_of)
        rows, held = set_aside(stage, rows, seed=seed)
        held_out = None
        if self.tokenizer is not None:
            examples = tokenize_stage(stage, rows, self.tokenizer, audit)
            self.lines.append(f"  {len(examples)} examples, {_steps(stage, len(examples))} steps")
            held_out = build_evaluation(stage, self.base_dir, self.tokenizer, seed=seed, rows=held)
        if held_out is not None:
            audit.check_overlap(rows, held_out[1], held_out=stage.data.held_out)
            self.lines.append(f"  {len(held_out[0])} held-out examples")
        self.lines += [f"  {line}" for line in audit.summary_lines()]

    def _rows_of(self, name: str) -> list[dict[str, Any]]:
        stage = next(stage for stage in self.stages if stage.name == name)
        return build_rows(
            stage, self.base_dir, seed=stage_seed(stage, self.recipe), audit=Audit(),
            earlier=self._rows_of,
        )  # fmt: skip

    def _prompts(self, stage: Stage, seed: int) -> None:
        if stage.data.rows_of is not None:
            self.lines.append(f"  the responses of stage {stage.data.rows_of}")
            return
        rows = load_prompts(stage.data, self.base_dir, seed=seed, audit=Audit())
        self._scorer(stage, [{**row, "responses": ["", ""]} for row in rows])
        for row in rows if self.tokenizer is not None else ():
            try:
                encode_prompt(self.tokenizer, row["prompt"], row.get("tools"))  # type: ignore[arg-type]
            except RowError as error:
                raise DataError(
                    str(error), where=f"stages.{stage.name}: row {row['id']}"
                ) from error
        assert stage.data.generate is not None  # the schema
        policies = [stage.init if p == "init" else p for p in stage.data.generate.policies]
        policies += [endpoint.model for endpoint in stage.data.generate.endpoints]
        self.lines.append(f"  {len(rows)} prompts; the responses come from {', '.join(policies)}")

    def _scorer(self, stage: Stage, rows: list[dict[str, Any]]) -> None:
        """What can be known of the scorer of a stage; a reward model of the run is not there yet."""
        score = stage.data.score
        if score is None:
            return
        if score.model is not None and any(score.model == other.name for other in self.stages):
            return

        def model(name: str) -> tuple[str, str]:
            folder = resolve_path(self.base_dir, name)
            if looks_like_path(name) and not (folder / "config.json").is_file():
                where = f"stages.{stage.name}.data.score.model: {folder}"
                raise ModelError("there is no reward model here", where=where)
            return name, name

        make_scorer(score, base_dir=self.base_dir, model=model).check(rows)

    def _evaluation(self, spec: EvalSpec) -> None:
        rows = evaluation_prompts(spec, self.base_dir, seed=self.recipe.seed)
        if spec.score is not None:
            make_scorer(spec.score).check(rows)


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
