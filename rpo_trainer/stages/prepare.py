"""`StagePreparer`: reads, mixes, filters and tokenizes the data of a recipe's stages.

`run`, `check`, `plan` and `preview` share it, so that they all use the same data. It resolves paths relative
to the recipe's directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rpo_trainer.data import (
    Audit,
    add_replay,
    filter_rows,
    load_rows,
    tokenize_rows,
)
from rpo_trainer.data.duplicates import prompt_key
from rpo_trainer.data.encode import PromptEncoder
from rpo_trainer.data.rows import Kind, Row, RowError
from rpo_trainer.data.sources import FirstRows
from rpo_trainer.errors import DataError
from rpo_trainer.models.loading import load_config, load_tokenizer
from rpo_trainer.recipe import (
    DataSpec,
    EvalSpec,
    LoadedRecipe,
    RewardStage,
    RPOStage,
    ScoreSpec,
    SFTStage,
    SourceSpec,
    Stage,
    expand_stages,
    resolve_path,
)
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.rewards.calibrate import fit_reward_scale, label_gaps
from rpo_trainer.rewards.pairs import make_preference_rows, pairs_arguments
from rpo_trainer.rewards.policies import check_truths
from rpo_trainer.rewards.scorers import Scorer, make_scorer
from rpo_trainer.rewards.verifiers import get_verifier, score_rows
from rpo_trainer.stages.inputs import (
    HeldOut,
    StageInputs,
    at_most,
    fitted_stage,
    held_out_filter,
    held_out_prompts,
    needs_policy,
    needs_rewards,
    row_kind,
    sampling_spec,
    scored_before_run,
    scorer_columns,
    set_aside,
    source_digests,
    stage_seed,
    tokenize_stage,
    with_targets,
)
from rpo_trainer.stages.record import InputRecord
from rpo_trainer.stages.settings import StageConfig, steps_of, training_config

_EVAL_KINDS: dict[str, Kind] = {"data": "prompt", "preferences": "pair", "nll": "sft"}


class StagePreparer:
    """Prepares the inputs of a recipe's stages.

    Every call reads the data again, except for the stage given to `keep`.

    Args:
        first: read only the first rows of each source; None: all.

    Attributes:
        stages: all stages, in order; repeated ones expanded.
        steps: optimizer steps of the stages prepared so far, by name; for prompts whose responses are still
            to be sampled, an upper bound.
    """

    def __init__(self, loaded: LoadedRecipe, first: FirstRows | None = None) -> None:
        self.loaded = loaded
        self.first = first
        self.recipe = loaded.recipe
        self.stages = expand_stages(loaded.recipe)
        self.steps: dict[str, int] = {}
        self._kept: dict[str, StageInputs | None] = {}  # by the stage's name

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The recipe's tokenizer, with its chat template.

        Raises:
            ModelError: it cannot be loaded.
        """
        return load_tokenizer(self.recipe.model, self.loaded.base_dir)

    def path(self, name: str) -> Path:
        """Resolve a path of the recipe."""
        return resolve_path(self.loaded.base_dir, name)

    def model_config(self, source: str | None = None, *, vocabulary: int | None = None) -> Any:
        """Load the config of the recipe's model, or of another source, see `load_config`.

        Args:
            vocabulary: minimum size of the vocabulary; None: that of the tokenizer.
        """
        tokens = len(self.tokenizer) if vocabulary is None else vocabulary
        return load_config(self.recipe.model, self.loaded.base_dir, source, tokens)

    def scorer(self, score: ScoreSpec, model: Callable[[str], tuple[str, str]]) -> Scorer:
        """Return the scorer of a `score` field, see `make_scorer`."""
        return make_scorer(score, base_dir=self.loaded.base_dir, model=model)

    def stage(self, name: str) -> Stage:
        """Return the stage with this name."""
        return next(stage for stage in self.stages if stage.name == name)

    def seed(self, stage: Stage) -> int:
        """Return the stage's seed, else the recipe's."""
        return stage_seed(stage, self.recipe)

    def number(self, stage: Stage) -> int:
        """Return the position of a stage, from 1."""
        return 1 + [other.name for other in self.stages].index(stage.name)

    def label(self, stage: Stage) -> str:
        """Return the prefix of a stage's log lines, `[1/3 NAME]`."""
        return f"[{self.number(stage)}/{len(self.stages)} {stage.name}]"

    def settings(self, stage: Stage, run_dir: Path) -> StageConfig:
        """Return the config of the stage's trainer, see `training_config`."""
        return training_config(
            stage, self.recipe.model, seed=self.seed(stage), folder=run_dir / stage.name,
            run_dir=run_dir,
        )  # fmt: skip

    # --- training data ---

    def keep(self, stage: Stage) -> None:
        """Prepare the inputs of this stage once and return them twice: for the check and for training.

        They stay in memory in between, so use this for the stage that trains first. Rows that a run samples
        or scores are not kept: a check cannot create them.
        """
        if stage.data.score is None and not needs_policy(stage.data):
            self._kept[stage.name] = None

    def prepare(
        self,
        stage: Stage,
        *,
        scored_rows: list[Row] | None = None,
        file_rows: list[Row] | None = None,
        audit: Audit | None = None,
        tokenize: bool = True,
    ) -> StageInputs:
        """Prepare the training rows and tokenized examples of a stage.

        Args:
            scored_rows: rows sampled and scored by `ScoredRows`; None: before a run. Then only verifiers
                score rows, and for a stage whose responses are still to be sampled, prompts are returned.
            file_rows: rows from `given_rows`, if already read; None: read them.
            audit: counts rows read and dropped.
            tokenize: False: rows only.

        Raises:
            DataError, Problems: data that cannot be read or trained on.
            ModelError: the tokenizer cannot be loaded.
        """
        audit = audit or Audit()
        if scored_rows is None and needs_policy(stage.data):
            prompts = self.prompts(stage, audit)
            held_out = held_out_prompts(stage, prompts, seed=self.seed(stage))
            rows, held = set_aside(prompts, held_out, audit)
            self.steps[stage.name] = steps_of(stage, len(rows))
            return StageInputs(stage, rows, audit, held)
        if tokenize and (prepared := self._kept.get(stage.name)) is not None:
            del self._kept[stage.name]
            return prepared
        rows, held = self._split_rows(stage, audit, scored_rows=scored_rows, file_rows=file_rows)
        train = tokenize_stage(stage, rows, self.tokenizer, audit) if tokenize else None
        self.steps[stage.name] = steps_of(stage, len(rows if train is None else train))
        inputs = StageInputs(fitted_stage(stage, audit), rows, audit, held, train)
        if tokenize and stage.name in self._kept:
            self._kept[stage.name] = inputs
        return inputs

    def prepare_held_out(self, inputs: StageInputs, *, tokenize: bool = True) -> None:
        """Add `held_out` to the inputs, and warn about prompts that are both trained and evaluated on.

        Args:
            tokenize: False: do not read the held-out rows of `data`.

        Raises:
            DataError: as `prepare`; or there are such prompts, and `data.eval_overlap` is `error`.
        """
        stage = inputs.stage
        if inputs.complete:
            return
        inputs.complete = tokenize
        sampled_later = inputs.train is None and needs_policy(stage.data)
        if tokenize and not (sampled_later and inputs.set_aside is not None):
            inputs.held_out = self._held_out(stage, inputs.set_aside)
        on_overlap = stage.data.eval_overlap
        if inputs.held_out is not None:
            inputs.audit.check_overlap(inputs.rows, inputs.held_out.rows, on_overlap=on_overlap)
        # Not `evaluation_of`: a reward model may score the responses of an evaluation.
        spec = stage.eval or self.recipe.eval
        for name, kind in _EVAL_KINDS.items():
            if spec is not None and (sources := getattr(spec, name)):
                found = at_most(self._load(sources, kind, Audit()), spec.max_rows)
                inputs.audit.check_overlap(
                    inputs.rows, found, on_overlap=on_overlap, where=f"eval.{name}"
                )

    def rows(
        self, stage: Stage, audit: Audit, *, scored_rows: list[Row] | None = None
    ) -> list[Row]:
        """Return the training rows of a stage before tokenization; arguments as in `prepare`."""
        return self._split_rows(stage, audit, scored_rows=scored_rows, file_rows=None)[0]

    def _split_rows(
        self,
        stage: Stage,
        audit: Audit,
        *,
        scored_rows: list[Row] | None,
        file_rows: list[Row] | None,
    ) -> tuple[list[Row], list[Row] | None]:
        """Return training rows, and held-out rows if `data.eval_fraction` is set."""
        data, seed = stage.data, self.seed(stage)
        if isinstance(stage, SFTStage):
            rows = self._load(data.train, "sft", audit, seed=seed, dedup=data.dedup)
            held_out = held_out_prompts(stage, rows, seed=seed)
            if data.replay is not None:
                earlier = self.rows(self.stage(data.replay.stage), Audit())
                rows = add_replay(rows, earlier, data.replay, seed=seed, audit=audit)
            return set_aside(rows, held_out, audit)
        if isinstance(stage, RewardStage) and stage.objective == "regression":
            rows = self._load(data.train, "rating", audit, seed=seed, dedup=data.dedup)
            rows = with_targets(stage, rows, audit)
            return set_aside(rows, held_out_prompts(stage, rows, seed=seed), audit)
        rows = self._pairs(stage, audit, file_rows) if scored_rows is None else scored_rows
        held_out = held_out_prompts(stage, rows, seed=seed)
        trained = [row for row in rows if held_out is None or prompt_key(row) not in held_out]
        given_gaps = [] if needs_policy(data) else label_gaps(trained)
        if scored_rows is not None or data.pairs is not None or scored_before_run(data.score):
            rows = make_preference_rows(rows, **pairs_arguments(data.pairs), seed=seed, audit=audit)
        rows = filter_rows(rows, data.filter, audit)
        if stage.trains_reward_model:
            _require_two_responses(stage, rows)
        rows, held = set_aside(rows, held_out, audit)
        if isinstance(stage, RPOStage) and (gaps := label_gaps(rows)):
            scale = stage.reward_scale
            if scale == "auto":
                against = any(gap < 0 for gap in given_gaps)
                fit = fit_reward_scale(given_gaps if against else gaps, labeled=against)
                audit.calibration, scale = asdict(fit), fit.reward_scale
            audit.check_target_gaps(rows, scale)
        return rows, held

    def source_digests(self, stage: Stage, inputs: Sequence[InputRecord] = ()) -> dict[str, str]:
        """Return digests of the stage's training files, see `source_digests`."""
        return source_digests(stage.data.train, self.loaded.base_dir, inputs)

    # --- rows whose responses or rewards are generated during the run ---

    def prompts(self, stage: Stage, audit: Audit) -> list[Row]:
        """Return the prompts of a stage that samples, or of the stage whose responses it uses.

        They include the columns that the scorer reads.
        """
        data = sampling_spec(stage.data, self.stages)
        rows = self._load(
            data.train, "prompt", audit, seed=self.seed(stage), dedup=data.dedup,
            keep=scorer_columns(data.score),
        )  # fmt: skip
        if data.generate is not None:
            check_truths(rows, data.generate)
        return rows

    def prompt_ids(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return the token ids of each prompt, as a policy gets them.

        Raises:
            DataError: the chat template cannot render a prompt.
        """
        found = []
        encoder = PromptEncoder(self.tokenizer)
        for row in rows:
            try:
                parsed = row.get("special_tokens") == "parse"
                ids = encoder.ids(
                    row["prompt"], row.get("tools"), parsed=parsed, template_kwargs=row.get(COLUMN)
                )
                found.append(ids)
            except RowError as error:
                raise DataError(
                    str(error),
                    code=error.code,
                    where=f"row {row['id']}",
                    why="no response to it can be sampled",
                    fix="correct the rows, or choose another chat_template: chatml | plain | a path",
                ) from error
        return found

    def given_rows(self, stage: Stage, audit: Audit) -> list[Row]:
        """Return the rows of a stage that scores given responses; rewards in the file are ignored."""
        data: DataSpec = stage.data
        return self._load(
            data.train, "pair", audit, seed=self.seed(stage), dedup=data.dedup,
            keep=scorer_columns(data.score), unscored=True,
        )  # fmt: skip

    # --- evaluation data ---

    def evaluation_prompts(self, spec: EvalSpec, audit: Audit | None = None) -> list[Row]:
        """Return the prompts to sample responses to, at most `max_rows`."""
        audit = audit or Audit()
        rows = self._load(spec.data, "prompt", audit, keep=scorer_columns(spec.score))
        return at_most(rows, spec.max_rows, audit)

    def evaluation_rows(
        self, spec: EvalSpec, field: str, audit: Audit, *, tokenize: bool = True
    ) -> list[Mapping[str, Any]]:
        """Return the examples of `preferences` or `nll`, or with `tokenize=False` their rows.

        The longest `max_length` of all stages applies, so that all are evaluated on the same examples.
        """
        kind = _EVAL_KINDS[field]
        rows = self._load(getattr(spec, field), kind, audit)
        if not tokenize:
            return list(rows)
        examples = tokenize_rows(
            at_most(rows, spec.max_rows, audit), self.tokenizer,
            kind="pair" if kind == "pair" else "sft", truncation="drop", audit=audit,
            refuse_special_text=True, max_length=max(stage.max_length for stage in self.stages),
        )  # fmt: skip
        return list(examples)

    # --- reading ---

    def _load(
        self,
        sources: Sequence[SourceSpec],
        kind: Kind,
        audit: Audit,
        *,
        seed: int | None = None,
        **more: Any,
    ) -> list[Row]:
        """Call `load_rows` with the recipe's directory and, by default, its seed."""
        return load_rows(
            sources, kind=kind, base_dir=self.loaded.base_dir, audit=audit, first=self.first,
            seed=self.recipe.seed if seed is None else seed, **more,
        )  # fmt: skip

    def _pairs(self, stage: Stage, audit: Audit, file_rows: list[Row] | None) -> list[Row]:
        """Return rows with given responses; if `score` is set, its rewards replace those in the file."""
        data = stage.data
        if data.score is not None:
            rows = self.given_rows(stage, audit) if file_rows is None else file_rows
            if not scored_before_run(data.score) or data.score.verifier is None:
                return [{**row, "rewards": None} for row in rows]
            return score_rows(rows, get_verifier(data.score.verifier))
        return self._load(
            data.train, "pair", audit, seed=self.seed(stage), dedup=data.dedup,
            require_rewards=needs_rewards(stage),
        )  # fmt: skip

    def _held_out(self, stage: Stage, rows: list[Row] | None) -> HeldOut | None:
        """Tokenize the rows that were set aside, else those of `data.eval`; None without any."""
        audit = Audit()
        if rows is None:
            if not stage.data.eval:
                return None
            kind = row_kind(stage)
            rows = self._load(
                stage.data.eval, kind, audit, seed=self.seed(stage),
                require_rewards=needs_rewards(stage),
            )  # fmt: skip
            if kind == "pair":
                rows = held_out_filter(stage, rows, audit)
            elif isinstance(stage, RewardStage):
                rows = with_targets(stage, rows, audit)
        return HeldOut(tokenize_stage(stage, rows, self.tokenizer, audit), rows, audit)


def _require_two_responses(stage: Stage, rows: Sequence[Row]) -> None:
    wide = [row for row in rows if len(row["responses"]) > 2]
    if wide:
        raise DataError(
            f"{len(wide)} of {len(rows)} rows have more than two responses, first {wide[0]['id']}",
            code="data.more-than-two-responses",
            where=f"stages.{stage.name}",
            why="the Bradley-Terry loss is defined on pairs",
            fix="add `pairs: {select: best_worst}` to `data`",
        )
