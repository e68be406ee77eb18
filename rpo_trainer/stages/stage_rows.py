"""`StageRows`: reads, mixes and filters the rows of a recipe's stages, before tokenization.

Rows that every process needs as text (prompts, responses to score, evaluation data) are read from their
sources once, and then from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rpo_trainer.data import Audit, add_replay, filter_rows, load_rows
from rpo_trainer.data.audit_json import read_audit, write_audit
from rpo_trainer.data.duplicates import prompt_key
from rpo_trainer.data.resumable_rows import content_key
from rpo_trainer.data.rows import Kind, Row
from rpo_trainer.data.sources import FirstRows
from rpo_trainer.data.store import DataStore, StoredRows, write_stored_rows
from rpo_trainer.errors import DataError
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
from rpo_trainer.rewards.calibrate import fit_reward_scale, label_gaps
from rpo_trainer.rewards.pairs import make_preference_rows, pairs_arguments
from rpo_trainer.rewards.policies import check_truths
from rpo_trainer.rewards.scorers import Scorer, make_scorer
from rpo_trainer.rewards.verifiers import get_verifier, score_rows
from rpo_trainer.stages.data_keys import SourceDigests, stage_settings
from rpo_trainer.stages.inputs import (
    at_most,
    held_out_filter,
    held_out_prompts,
    needs_policy,
    needs_rewards,
    row_kind,
    sampling_spec,
    scored_before_run,
    scorer_columns,
    set_aside,
    stage_seed,
    with_targets,
)

EVAL_KINDS: dict[str, Kind] = {"data": "prompt", "preferences": "pair", "nll": "sft"}
_ROWS, _HELD_OUT, _AUDIT = "rows.arrow", "held-out.arrow", "audit.json"


class StageRows:
    """The rows of a recipe's stages.

    Args:
        folder: the directory of prepared data (`DataStore`); None: a temporary one.
        first: read only the first rows of each source, and keep nothing; None: read all.

    Attributes:
        stages: all stages, in order; repeated ones expanded.
    """

    def __init__(
        self, loaded: LoadedRecipe, folder: Path | None = None, *, first: FirstRows | None = None
    ) -> None:
        self.first = first
        self.loaded = loaded
        self.recipe = loaded.recipe
        self.stages = expand_stages(loaded.recipe)
        self.store = DataStore(folder)
        index = None if folder is None else folder / "sources.json"
        self.digests = SourceDigests(loaded.base_dir, index)
        self.replayed = {stage.data.replay.stage for stage in self.stages if stage.data.replay}

    def path(self, name: str) -> Path:
        """Resolve a path of the recipe."""
        return resolve_path(self.loaded.base_dir, name)

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

    def scorer(self, score: ScoreSpec, model: Callable[[str], tuple[str, str]]) -> Scorer:
        """Return the scorer of a `score` field, see `make_scorer`."""
        return make_scorer(score, base_dir=self.loaded.base_dir, model=model)

    # --- training rows ---

    def rows(
        self, stage: Stage, audit: Audit, scored: list[Row] | None = None
    ) -> tuple[list[Row], list[Row] | None]:
        """Return training rows, and held-out rows if `data.eval_fraction` is set.

        Args:
            scored: rows sampled or scored by a run; None: before a run, when only verifiers score rows.
        """
        data, seed = stage.data, self.seed(stage)
        if isinstance(stage, SFTStage):
            rows = self._load(data.train, "sft", audit, seed=seed, dedup=data.dedup)
            held_out = held_out_prompts(stage, rows, seed=seed)
            if data.replay is not None:
                earlier, _ = self.training_rows(self.stage(data.replay.stage), Audit())
                rows = add_replay(rows, earlier, data.replay, seed=seed, audit=audit)
            return set_aside(rows, held_out, audit)
        if isinstance(stage, RewardStage) and stage.objective == "regression":
            rows = self._load(data.train, "rating", audit, seed=seed, dedup=data.dedup)
            rows = with_targets(stage, rows, audit)
            return set_aside(rows, held_out_prompts(stage, rows, seed=seed), audit)
        rows = self._pairs(stage, audit) if scored is None else scored
        held_out = held_out_prompts(stage, rows, seed=seed)
        trained = [row for row in rows if held_out is None or prompt_key(row) not in held_out]
        given_gaps = [] if needs_policy(data) else label_gaps(trained)
        if scored is not None or data.pairs is not None or scored_before_run(data.score):
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

    def training_rows(
        self, stage: Stage, audit: Audit, scored: list[Row] | None = None
    ) -> tuple[Sequence[Row], list[Row] | None]:
        """Return the same as `rows`; those of a stage that is replayed are read once for both stages."""
        if stage.name not in self.replayed or self.first is not None:
            return self.rows(stage, audit, scored)
        key = content_key("replayed", stage_settings(stage), self.seed(stage),
                          self.sources_of(stage))  # fmt: skip
        new: list[tuple[list[Row], list[Row] | None]] = []

        def build(folder: Path) -> None:
            counts = Audit()
            rows, held = self.rows(stage, counts)
            _keep(folder, rows, counts)
            if held is not None:
                write_stored_rows(folder / _HELD_OUT, held)
            new.append((rows, held))

        entry = self.store.entry(key, build, f"the rows of stage {stage.name}")
        audit.adopt(read_audit(entry / _AUDIT))
        if new:
            return new[0]
        held_out = entry / _HELD_OUT
        held = list(StoredRows(held_out)) if held_out.exists() else None
        return StoredRows(entry / _ROWS), held

    def rows_to_show(self, stage: Stage) -> list[Row]:
        """Return the training rows of a stage, or the prompts if their responses are still to be sampled."""
        audit = Audit()
        if not needs_policy(stage.data):
            return list(self.training_rows(stage, audit)[0])
        prompts = self.prompts(stage, audit)
        held_out = held_out_prompts(stage, prompts, seed=self.seed(stage))
        return set_aside(prompts, held_out, audit)[0]

    def _pairs(self, stage: Stage, audit: Audit) -> list[Row]:
        """Return rows with given responses; if `score` is set, its rewards replace those in the file."""
        data = stage.data
        if data.score is not None:
            rows = self.given_rows(stage, audit)
            if not scored_before_run(data.score) or data.score.verifier is None:
                return [{**row, "rewards": None} for row in rows]
            return score_rows(rows, get_verifier(data.score.verifier))
        return self._load(
            data.train, "pair", audit, seed=self.seed(stage), dedup=data.dedup,
            require_rewards=needs_rewards(stage),
        )  # fmt: skip

    # --- rows that every process reads as text ---

    def prompts(self, stage: Stage, audit: Audit) -> list[Row]:
        """Return the prompts of a stage that samples, or of the stage whose responses it uses.

        They include the columns that the scorer reads.
        """
        data = sampling_spec(stage.data, self.stages)
        rows = self._load_stored(
            data.train, "prompt", audit, seed=self.seed(stage), dedup=data.dedup,
            keep=scorer_columns(data.score),
        )  # fmt: skip
        if data.generate is not None:
            check_truths(rows, data.generate)
        return rows

    def given_rows(self, stage: Stage, audit: Audit) -> list[Row]:
        """Return the rows of a stage that scores given responses; rewards in the file are ignored."""
        data: DataSpec = stage.data
        return self._load_stored(
            data.train, "pair", audit, seed=self.seed(stage), dedup=data.dedup,
            keep=scorer_columns(data.score), unscored=True,
        )  # fmt: skip

    def held_out_rows(self, stage: Stage, audit: Audit) -> list[Row]:
        """Return the rows of `data.eval`."""
        kind = row_kind(stage)
        rows = self._load_stored(
            stage.data.eval,
            kind,
            audit,
            seed=self.seed(stage),
            require_rewards=needs_rewards(stage),
        )
        if kind == "pair":
            return held_out_filter(stage, rows, audit)
        return with_targets(stage, rows, audit) if isinstance(stage, RewardStage) else rows

    def evaluation_rows(self, spec: EvalSpec, field: str, audit: Audit | None = None) -> list[Row]:
        """Return the rows of `data`, `preferences` or `nll` of an evaluation, at most `max_rows`."""
        audit = audit or Audit()
        keep = scorer_columns(spec.score) if field == "data" else ()
        rows = self._load_stored(getattr(spec, field), EVAL_KINDS[field], audit, keep=keep)
        return at_most(rows, spec.max_rows, audit)

    # --- reading ---

    def sources_of(self, stage: Stage) -> list[Any]:
        """Return the digests of the sources that a stage's training and held-out rows are read from."""
        data = sampling_spec(stage.data, self.stages)
        found = [self.digests.of(data.train), self.digests.of(stage.data.eval)]
        if data.replay is not None:
            earlier = self.stage(data.replay.stage)
            settings = [earlier.data.model_dump(mode="json"), self.seed(earlier)]
            found += [settings, self.sources_of(earlier)]
        return found

    def _load_stored(
        self,
        sources: Sequence[SourceSpec],
        kind: Kind,
        audit: Audit,
        *,
        seed: int | None = None,
        keep: Collection[str] = (),
        **more: Any,
    ) -> list[Row]:
        """Call `load_rows`, or read its rows from the store."""
        seed = self.recipe.seed if seed is None else seed
        if self.first is not None:
            return self._load(sources, kind, audit, seed=seed, keep=keep, **more)
        key = content_key("rows", self.digests.of(sources), kind, seed, sorted(keep), more)

        def build(folder: Path) -> None:
            counts = Audit()
            rows = self._load(sources, kind, counts, seed=seed, keep=keep, **more)
            _keep(folder, rows, counts)

        names = ", ".join(source.path or source.task or "" for source in sources)
        entry = self.store.entry(key, build, f"the rows of {names}")
        audit.adopt(read_audit(entry / _AUDIT))
        return list(StoredRows(entry / _ROWS))

    def _load(
        self,
        sources: Sequence[SourceSpec],
        kind: Kind,
        audit: Audit,
        *,
        seed: int,
        **more: Any,
    ) -> list[Row]:
        """Call `load_rows` with the recipe's directory."""
        return load_rows(
            sources, kind=kind, base_dir=self.loaded.base_dir, audit=audit, seed=seed,
            first=self.first, **more,
        )  # fmt: skip


def _keep(folder: Path, rows: Sequence[Row], audit: Audit) -> None:
    write_stored_rows(folder / _ROWS, rows)
    write_audit(folder / _AUDIT, audit)


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
