"""What one stage trains on, and the rules of its kind: which rows it needs and how they become examples.

`StagePreparer` reads the data and makes a `StageInputs` of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import xxhash

from rpo_trainer.data import Audit, filter_rows, hold_out, rating_targets, tokenize_rows
from rpo_trainer.data.counts import EVAL_ROWS, HELD_OUT
from rpo_trainer.data.duplicates import prompt_key
from rpo_trainer.errors import DataError
from rpo_trainer.recipe import (
    RewardStage,
    RPOStage,
    SFTStage,
    SourceSpec,
    Stage,
    resolve_path,
)
from rpo_trainer.rewards.verifiers import VERIFIERS
from rpo_trainer.runtime.files import known_digest, tree_digest

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from rpo_trainer.data.rows import Row
    from rpo_trainer.recipe import DataSpec, EvalSpec, Recipe, ScoreSpec
    from rpo_trainer.recipe.schema import FilterSpec
    from rpo_trainer.stages.record import InputRecord


@dataclass
class HeldOut:
    """What a stage is evaluated on: tokenized examples, their rows, and what became of the others."""

    examples: datasets.Dataset
    rows: list[Row] = field(repr=False)
    audit: Audit


@dataclass
class StageInputs:
    """What a stage trains on, and what became of the rest.

    Attributes:
        stage: with the `reward_scale` that was fitted to the rows, where it is `auto`.
        rows: the training rows, not tokenized; the prompts, where their responses are still to be sampled.
        set_aside: rows that `data.eval_fraction` keeps for the evaluation; None: it is not set.
        train: tokenized examples; None: not tokenized, or without responses yet.
        held_out: for the evaluation in training; None: the stage has none, or it is not prepared.
        complete: whether `held_out` is prepared, and the remarks on it are in `audit`.
        audit: what was read, dropped and noticed.
    """

    stage: Stage
    rows: list[Row] = field(repr=False)
    audit: Audit
    set_aside: list[Row] | None = field(default=None, repr=False)
    train: datasets.Dataset | None = None
    held_out: HeldOut | None = None
    complete: bool = False

    def fingerprint(self) -> str:
        """Content key of the training examples, in their order."""
        assert self.train is not None
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
    sources: Sequence[SourceSpec], folder: Path, inputs: Sequence[InputRecord] = ()
) -> dict[str, str]:
    """xxh3-128 of each local file, or directory, that a stage reads, by its path as written.

    Args:
        folder: of the recipe, where relative paths start.
        inputs: of the stage's record; a file is not read again while nothing has been written to it.
    """
    known = {entry.name: entry.to_json().get("files", {}) for entry in inputs}
    found: dict[str, str] = {}
    for name in [source.path for source in sources if source.path]:
        path, files = resolve_path(folder, name), known.get(name, {})
        if path.is_file():
            found[name] = known_digest(path, files.get(path.name))["digest"]
        elif path.exists():
            found[name] = tree_digest(path, files)
    return found


# --- rules of a stage's kind ---


def stage_seed(stage: Stage, recipe: Recipe) -> int:
    """The stage's own seed, else the recipe's."""
    return recipe.seed if stage.seed is None else stage.seed


def evaluation_of(stage: Stage, recipe: Recipe) -> tuple[str, EvalSpec] | None:
    """The recipe's key of what is measured after a stage, and this; None: nothing.

    A reward model is not measured so, but by its held-out pairs and ratings.
    """
    if stage.trains_reward_model:
        return None
    if stage.eval is not None:
        return f"stages.{stage.name}.eval", stage.eval
    return None if recipe.eval is None else ("eval", recipe.eval)


def row_kind(stage: Stage) -> Literal["sft", "pair", "rating"]:
    """What the rows of a stage are."""
    if isinstance(stage, RewardStage) and stage.objective == "regression":
        return "rating"
    return "sft" if isinstance(stage, SFTStage) else "pair"


def needs_rewards(stage: Stage) -> bool:
    """Whether the loss of a stage reads a reward of every response."""
    margin = isinstance(stage, RewardStage) and stage.margin_scale > 0
    return isinstance(stage, RPOStage) or margin


def needs_policy(data: DataSpec) -> bool:
    """Whether there are no responses before the run has sampled them."""
    return data.generate is not None or data.responses_from is not None


def scored_before_run(score: ScoreSpec | None) -> bool:
    """Whether the rewards cost nothing and touch nothing: rows can be scored before a run."""
    return score is not None and score.verifier not in (None, "asserts")


def scorer_columns(score: ScoreSpec | None) -> tuple[str, ...]:
    """What scoring reads of a row beside its prompt and responses."""
    if score is None or score.verifier is None:
        return ()
    return VERIFIERS[score.verifier].columns


def sampling_spec(data: DataSpec, stages: Sequence[Stage]) -> DataSpec:
    """`data` itself, or that of the stage whose sampled responses it takes (`responses_from`)."""
    while data.responses_from is not None:
        data = next(stage.data for stage in stages if stage.name == data.responses_from)
    return data


def sources_of_rows(data: DataSpec) -> dict[str, str]:
    """What a stage's rows are made with, by field: stages, words or paths, as `init` has them."""
    found = {}
    if data.responses_from is not None:
        found["responses_from"] = data.responses_from
    if data.score is not None and data.score.model is not None:
        found["score.model"] = data.score.model
    for number, name in enumerate(data.generate.policies if data.generate is not None else ()):
        found[f"generate.policies.{number}"] = name
    return found


# --- steps of the preparation that read no file ---


def fitted_stage(stage: Stage, audit: Audit) -> Stage:
    """The stage with the η that was fitted to its rows, where it is to be fitted."""
    if not audit.calibration:
        return stage
    return stage.model_copy(update={"reward_scale": audit.calibration["reward_scale"]})


def tokenize_stage(
    stage: Stage, rows: list[Row], tokenizer: PreTrainedTokenizerBase, audit: Audit
) -> datasets.Dataset:
    """The rows as tokenized examples."""
    return tokenize_rows(
        rows,
        tokenizer,
        kind=row_kind(stage),
        max_length=stage.max_length,
        truncation=stage.truncation,
        audit=audit,
        refuse_special_text=True,
        all_end=stage.trains_reward_model,
    )


def with_targets(stage: RewardStage, rows: list[Row], audit: Audit) -> list[Row]:
    """Rated rows with the ratings that the stage is trained on."""
    assert stage.attributes is not None  # the schema
    bounds = None if stage.rating_range is None else (stage.rating_range[0], stage.rating_range[1])
    return rating_targets(rows, stage.attributes, rating_range=bounds, audit=audit)


def held_out_prompts(stage: Stage, rows: Sequence[Row], *, seed: int) -> frozenset[bytes] | None:
    """Keys of the prompts that `data.eval_fraction` holds out; None: it is not set.

    Args:
        rows: as read, before any is dropped for its rewards: so the same prompts are held out before a
            run, when their responses are still to be sampled, and whatever the filter is.
    """
    fraction = stage.data.eval_fraction
    if fraction is None or not rows:
        return None
    return frozenset(map(prompt_key, hold_out(rows, fraction, seed=seed)[1]))


def set_aside(
    rows: list[Row], prompts: frozenset[bytes] | None, audit: Audit
) -> tuple[list[Row], list[Row] | None]:
    """Rows to train on, and the rows of the held-out prompts; None without any such prompt.

    Raises:
        DataError: all rows of the held-out prompts have been dropped before.
    """
    if prompts is None:
        return rows, None
    train = [row for row in rows if prompt_key(row) not in prompts]
    held = [row for row in rows if prompt_key(row) in prompts]
    if rows and not held:
        raise DataError(
            f"no row of the {len(prompts)} held-out prompts is left",
            code="data.no-held-out-rows",
            where="data.eval_fraction",
            why="the filter, ties or missing rewards dropped all of them",
            fix="raise `eval_fraction`, loosen `filter`, or give held-out rows in `data.eval`",
        )
    audit.leave_out_all(HELD_OUT, rows, train)
    return train, held


def held_out_filter(stage: Stage, rows: list[Row], audit: Audit) -> list[Row]:
    """Held-out pairs without what `filter` says of ties and of reversed pairs.

    Its thresholds choose what is trained on.
    """
    spec: FilterSpec | None = stage.data.filter
    if spec is not None:
        spec = type(spec).model_construct(ties=spec.ties, reversed=spec.reversed)
    return filter_rows(rows, spec, audit)


def at_most(rows: list[Row], limit: int | None, audit: Audit | None = None) -> list[Row]:
    """The rows, or `limit` of them at even distances, so that each source has its share."""
    if limit is None or len(rows) <= limit:
        return rows
    kept = [rows[i * len(rows) // limit] for i in range(limit)]
    if audit is not None:
        audit.leave_out_all(EVAL_ROWS, rows, kept)
    return kept
