"""The rows of a stage: read, filter, replay, or generate → score → pairs; then tokenise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import xxhash
from transformers import PreTrainedTokenizerBase

from rpo_trainer.data import (
    Audit,
    add_replay,
    filter_rows,
    hold_out,
    load_rows,
    rating_targets,
    tokenize_rows,
)
from rpo_trainer.data.counts import EVAL_ROWS, HELD_OUT
from rpo_trainer.errors import DataError
from rpo_trainer.recipe import (
    RewardStage,
    RPOStage,
    SFTStage,
    SourceSpec,
    Stage,
    resolve_path,
)
from rpo_trainer.rewards.calibrate import fit_reward_scale, label_gaps
from rpo_trainer.rewards.pairs import make_preference_rows, pairs_arguments
from rpo_trainer.rewards.verifiers import get_verifier, score_rows
from rpo_trainer.runtime.files import known_digest, tree_digest
from rpo_trainer.stages.made import load_given, scorer_columns

if TYPE_CHECKING:
    from rpo_trainer.data.rows import Kind
    from rpo_trainer.recipe import DataSpec, EvalSpec, Recipe, ScoreSpec
    from rpo_trainer.recipe.schema import FilterSpec
    from rpo_trainer.stages.record import InputRecord


@dataclass
class StageData:
    """What a stage trains on, and what became of the rest.

    Attributes:
        train, evaluation: tokenised examples.
        audit: what was read, dropped and noticed.
        rows: the training rows themselves, for stages that replay them.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    audit: Audit
    rows: list[dict[str, Any]] = field(repr=False)

    def fingerprint(self) -> str:
        """Content key of the training examples, in their order."""
        return dataset_fingerprint(self.train)


def dataset_fingerprint(dataset: datasets.Dataset) -> str:
    """xxh3-128 over tokens, masks, and rewards or ratings."""
    digest = xxhash.xxh3_128()
    columns = ["prompt_ids", "response_ids", "response_mask", "rewards"]
    columns += [name for name in ("attributes",) if name in dataset.column_names]
    for row in dataset:
        parts = [row[name] for name in columns]
        digest.update(json.dumps(parts).encode())
    return str(digest.hexdigest())


def source_digests(
    sources: Sequence[SourceSpec], base_dir: Path, inputs: Sequence[InputRecord] = ()
) -> dict[str, str]:
    """xxh3-128 of each local file, or directory, that a stage reads, by its path as written.

    Args:
        inputs: of the stage's record; a file is not read again while nothing has been written to it.
    """
    known = {entry.name: entry.to_json().get("files", {}) for entry in inputs}
    found: dict[str, str] = {}
    for name in [source.path for source in sources if source.path]:
        path, files = resolve_path(base_dir, name), known.get(name, {})
        if path.is_file():
            found[name] = known_digest(path, files.get(path.name))["digest"]
        elif path.exists():
            found[name] = tree_digest(path, files)
    return found


def stage_seed(stage: Stage, recipe: Recipe) -> int:
    """The stage's own seed, else the recipe's."""
    return recipe.seed if stage.seed is None else stage.seed


def row_kind(stage: Stage) -> Literal["sft", "pair", "rating"]:
    """What the rows of a stage are."""
    if isinstance(stage, RewardStage) and stage.objective == "regression":
        return "rating"
    return "sft" if isinstance(stage, SFTStage) else "pair"


def _needs_rewards(stage: Stage) -> bool:
    margin = isinstance(stage, RewardStage) and stage.margin_scale > 0
    return isinstance(stage, RPOStage) or margin


def needs_policy(data: DataSpec) -> bool:
    """Whether there are no responses before the run has sampled them."""
    return data.generate is not None or data.responses_from is not None


def rows_by_stage(
    stages: Sequence[Stage], recipe: Recipe, base_dir: Path
) -> Callable[[str], list[dict[str, Any]]]:
    """From a stage's name to the rows that it trains on, as `build_rows` wants for replay."""

    def rows(name: str) -> list[dict[str, Any]]:
        stage = next(stage for stage in stages if stage.name == name)
        seed = stage_seed(stage, recipe)
        return build_rows(stage, base_dir, seed=seed, audit=Audit(), earlier=rows)

    return rows


def build_rows(
    stage: Stage,
    base_dir: Path,
    *,
    seed: int,
    audit: Audit,
    earlier: Callable[[str], list[dict[str, Any]]],
    made: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Training rows of a stage, not yet tokenised.

    Args:
        earlier: training rows of an earlier stage by name, for replay.
        made: what `RowMaker` has made; None: before a run, where a verifier scores here and now, and
            other scorers leave the rows as they are.
    """
    data = stage.data
    if isinstance(stage, SFTStage):
        rows = load_rows(
            data.train, kind="sft", base_dir=base_dir, dedup=data.dedup, audit=audit, seed=seed
        )
        if data.replay is not None:
            rows = add_replay(rows, earlier(data.replay.stage), data.replay, seed=seed, audit=audit)
        return rows
    if isinstance(stage, RewardStage) and stage.objective == "regression":
        rows = load_rows(
            data.train, kind="rating", base_dir=base_dir, dedup=data.dedup, audit=audit, seed=seed
        )
        return _targets(stage, rows, audit)
    rows = _given(stage, base_dir, seed, audit) if made is None else made
    labelled = not needs_policy(data)
    given_gaps = label_gaps(rows) if labelled else []
    if made is not None or data.pairs is not None or _scored_here(data.score):
        rows = make_preference_rows(rows, **pairs_arguments(data.pairs), seed=seed, audit=audit)
    rows = filter_rows(rows, data.filter, audit)
    if isinstance(stage, RewardStage) and (wide := [r for r in rows if len(r["responses"]) > 2]):
        raise DataError(
            f"{len(wide)} of {len(rows)} rows have more than two responses, first {wide[0]['id']}",
            code="data.more-than-two-responses",
            where=f"stages.{stage.name}",
            why="Bradley-Terry is a loss of pairs",
            fix="add `pairs: {select: best_worst}` to `data`",
        )
    if isinstance(stage, RPOStage) and (gaps := label_gaps(rows)):
        scale = stage.reward_scale
        if scale == "auto":
            against = any(gap < 0 for gap in given_gaps)
            fit = fit_reward_scale(given_gaps if against else gaps, labelled=against)
            audit.calibration, scale = asdict(fit), fit.reward_scale
        audit.check_target_gaps(rows, scale)
    return rows


def fitted_stage(stage: Stage, audit: Audit) -> Stage:
    """The stage with the η that `build_rows` has fitted, where it is to be fitted."""
    if not audit.calibration:
        return stage
    return stage.model_copy(update={"reward_scale": audit.calibration["reward_scale"]})


def tokenize_stage(
    stage: Stage, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, audit: Audit
) -> datasets.Dataset:
    """The rows as tokenised examples."""
    return tokenize_rows(
        rows,
        tokenizer,
        kind=row_kind(stage),
        max_length=stage.max_length,
        truncation=stage.truncation,
        audit=audit,
        refuse_special_text=True,
        all_end=isinstance(stage, RewardStage),
    )


def _targets(stage: RewardStage, rows: list[dict[str, Any]], audit: Audit) -> list[dict[str, Any]]:
    assert stage.attributes is not None  # the schema
    bounds = None if stage.rating_range is None else (stage.rating_range[0], stage.rating_range[1])
    return rating_targets(rows, stage.attributes, rating_range=bounds, audit=audit)


def set_aside(
    stage: Stage, rows: list[dict[str, Any]], *, seed: int, audit: Audit
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Rows to train on, and those that `data.eval_fraction` keeps for the evaluation."""
    share = stage.data.eval_fraction
    if share is None:
        return rows, None
    train, held = hold_out(rows, share, seed=seed)
    audit.leave_out_all(HELD_OUT, rows, train)
    return train, held


def build_evaluation(
    stage: Stage,
    base_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    rows: list[dict[str, Any]] | None = None,
) -> tuple[datasets.Dataset, list[dict[str, Any]], Audit] | None:
    """Held-out examples for the loss, their rows and their audit; None without any.

    Args:
        rows: those of `set_aside`; None: those of `data.eval`.
    """
    audit = Audit()
    if rows is None:
        if not stage.data.eval:
            return None
        kind: Kind = row_kind(stage)
        rows = load_rows(
            stage.data.eval,
            kind=kind,
            base_dir=base_dir,
            require_rewards=_needs_rewards(stage),
            audit=audit,
            seed=seed,
        )
        if kind == "pair":
            rows = filter_rows(rows, _policies(stage.data.filter), audit)
        elif isinstance(stage, RewardStage):
            rows = _targets(stage, rows, audit)
    return tokenize_stage(stage, rows, tokenizer, audit), rows, audit


def _policies(spec: FilterSpec | None) -> FilterSpec | None:
    """What a filter says of ties and of reversed pairs; its thresholds choose what is trained on."""
    if spec is None:
        return None
    return type(spec).model_construct(ties=spec.ties, reversed=spec.reversed)


def at_most(
    rows: list[dict[str, Any]], limit: int | None, audit: Audit | None = None
) -> list[dict[str, Any]]:
    """The rows, or `limit` of them at even distances, so that each source has its share."""
    if limit is None or len(rows) <= limit:
        return rows
    kept = [rows[i * len(rows) // limit] for i in range(limit)]
    if audit is not None:
        audit.leave_out_all(EVAL_ROWS, rows, kept)
    return kept


def evaluation_prompts(
    spec: EvalSpec, base_dir: Path, *, seed: int, audit: Audit | None = None
) -> list[dict[str, Any]]:
    """Prompts to sample responses to, at most `max_rows` of them."""
    keep = scorer_columns(spec.score)
    audit = audit or Audit()
    rows = load_rows(spec.data, kind="prompt", base_dir=base_dir, keep=keep, audit=audit, seed=seed)
    return at_most(rows, spec.max_rows, audit)


def check_overlap(
    stage: Stage,
    recipe: Recipe,
    base_dir: Path,
    rows: Sequence[dict[str, Any]],
    held_out: Sequence[dict[str, Any]] | None,
    audit: Audit,
) -> None:
    """Remarks on prompts of `rows` that the stage is also measured with, by `data.eval` or by `eval`.

    Raises:
        DataError: there are some, and `data.eval_overlap` is `error`.
    """
    on_overlap = stage.data.eval_overlap
    if held_out is not None:
        audit.check_overlap(rows, held_out, on_overlap=on_overlap)
    spec = stage.eval or recipe.eval
    if spec is None:
        return
    kinds: dict[str, Kind] = {"data": "prompt", "preferences": "pair", "nll": "sft"}
    for name, kind in kinds.items():
        if sources := getattr(spec, name):
            options: dict[str, Any] = {"base_dir": base_dir, "seed": recipe.seed}
            found = load_rows(sources, kind=kind, audit=Audit(), **options)
            found = at_most(found, spec.max_rows)
            audit.check_overlap(rows, found, on_overlap=on_overlap, where=f"eval.{name}")


def _scored_here(score: ScoreSpec | None) -> bool:
    """Whether the rewards cost nothing and touch nothing: rows can be scored before a run."""
    return score is not None and score.verifier not in (None, "asserts")


def _given(stage: Stage, base_dir: Path, seed: int, audit: Audit) -> list[dict[str, Any]]:
    """Rows that come with their responses; `score` gives these rewards, in place of any of their own."""
    data = stage.data
    if data.score is not None:
        rows = load_given(data, base_dir, seed=seed, audit=audit)
        if not _scored_here(data.score) or data.score.verifier is None:
            return [{**row, "rewards": None} for row in rows]
        return score_rows(rows, get_verifier(data.score.verifier))
    return load_rows(
        data.train,
        kind="pair",
        base_dir=base_dir,
        require_rewards=_needs_rewards(stage),
        dedup=data.dedup,
        audit=audit,
        seed=seed,
    )
