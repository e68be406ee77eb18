"""Rows that a run makes itself: responses sampled from policies, and rewards given to them.

Both are written under the stage, and are there again when the run resumes: `responses-KEY.jsonl` and
`generated-KEY.jsonl` (the same with rewards), or `scored-KEY.jsonl` where the responses were given.
KEY stands for all that they depend on, the weights too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_trainer.data import Audit, encode_prompt, load_rows
from rpo_trainer.data.judge_bias import biases
from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import DataError
from rpo_trainer.recipe import DataSpec, ScoreSpec, Stage, resolve_path
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.rewards.policies import (
    EndpointPolicy,
    LocalPolicy,
    Policy,
    check_truths,
    sample_rows,
)
from rpo_trainer.rewards.resumable_rows import content_key, is_intact, map_rows_resumable, read_rows
from rpo_trainer.rewards.scorers import Scorer, make_scorer, weights_key
from rpo_trainer.rewards.verifiers import VERIFIERS
from rpo_trainer.runtime.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


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


def scorer_columns(score: ScoreSpec | None) -> tuple[str, ...]:
    """What scoring reads of a row beside its prompt and responses."""
    if score is None or score.verifier is None:
        return ()
    return VERIFIERS[score.verifier].columns


def load_prompts(data: DataSpec, base_dir: Path, *, seed: int, audit: Audit) -> list[Row]:
    """The prompts of a stage that samples, with what its scorer reads of them."""
    rows = load_rows(
        data.train, kind="prompt", base_dir=base_dir, dedup=data.dedup,
        keep=scorer_columns(data.score), audit=audit, seed=seed,
    )  # fmt: skip
    if data.generate is not None:
        check_truths(rows, data.generate)
    return rows


def sampling(data: DataSpec, stages: Sequence[Stage]) -> DataSpec:
    """`data` itself, or that of the stage whose sampled responses it takes (`responses_from`)."""
    while data.responses_from is not None:
        data = next(stage.data for stage in stages if stage.name == data.responses_from)
    return data


def prompt_ids(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each prompt, as a policy gets them.

    Raises:
        DataError: a prompt that the chat template refuses, or that it cannot be written with.
    """
    found = []
    for row in rows:
        try:
            parsed = row.get("special_tokens") == "parse"
            ids = encode_prompt(
                tokenizer, row["prompt"], row.get("tools"), parsed=parsed,
                template_kwargs=row.get(COLUMN),
            )  # fmt: skip
            found.append(ids)
        except RowError as error:
            raise DataError(
                str(error),
                code=error.code,
                where=f"row {row['id']}",
                why="no response can be sampled to it",
                fix="correct the rows, or choose another chat_template: chatml | plain | a path",
            ) from error
    return found


def load_given(data: DataSpec, base_dir: Path, *, seed: int, audit: Audit) -> list[Row]:
    """The rows of a stage that scores responses which are there; their own rewards do not count."""
    return load_rows(
        data.train, kind="pair", base_dir=base_dir, dedup=data.dedup,
        keep=scorer_columns(data.score), unscored=True, audit=audit, seed=seed,
    )  # fmt: skip


@dataclass(frozen=True)
class RowMaker:
    """Makes the rows of the stages of one run.

    Attributes:
        stages: all stages of the run, by name.
        seed: of a stage.
        policy: from a stage and a source (`init`, another stage, `model`, a path) to its policy.
        weights: from such a source to a key of its weights.
        label: of a stage, in front of what is logged while its rows are made.
        ranks: the processes of the run; all of them call `rows`.
    """

    base_dir: Path
    run_dir: Path
    stages: Mapping[str, Stage]
    seed: Callable[[Stage], int]
    policy: Callable[[Stage, str], Loaded]
    weights: Callable[[Stage, str], str]
    label: Callable[[Stage], str]
    ranks: Ranks = ALONE

    def rows(self, stage: Stage, audit: Audit) -> list[Row] | None:
        """Rows with responses and rewards; None for a stage whose rows are all given.

        Raises:
            DataError, Problems: rows that cannot be read, sampled for or scored.
            ModelError: a policy or a reward model that cannot be loaded.
            RunError: an endpoint that refuses, or does not answer.
        """
        data = stage.data
        if data.responses_from is not None:
            return self.rows(self.stages[data.responses_from], audit)
        if data.score is None:
            return None
        seed = self.seed(stage)
        load = load_prompts if data.generate is not None else load_given
        with self.ranks.raise_on_all_ranks():
            rows = load(data, self.base_dir, seed=seed, audit=audit)
            scorer = self.scorer(data.score)
            if data.generate is not None:
                scorer.check([{**row, "responses": ["", ""]} for row in rows])
            else:
                scorer.check(rows)
        if data.generate is not None:
            rows = self._sampled(stage, rows, seed)
        name = "scored" if data.generate is None else "generated"
        rows = self._scored(stage, name, rows, scorer)
        if data.score.judge is not None:
            audit.judge = biases(rows)
        return rows

    def scorer(self, score: ScoreSpec) -> Scorer:
        """The scorer of a stage, its reward model found in the run where it is a stage's."""
        return make_scorer(score, base_dir=self.base_dir, model=self._reward_model)

    def _reward_model(self, name: str) -> tuple[str, str]:
        if name in self.stages:
            path = self.run_dir / name / "final"
        else:
            path = resolve_path(self.base_dir, name)
            if not path.is_dir():
                return name, name  # of the hub
        return str(path), weights_key(path)

    def _sampled(self, stage: Stage, rows: list[Row], seed: int) -> list[Row]:
        spec = stage.data.generate
        assert spec is not None

        def load(source: str) -> Callable[[], Loaded]:
            return lambda: self.policy(stage, source)

        policies: list[Policy] = [
            LocalPolicy(
                stage.init if source == "init" else source, load(source), spec,
                weights=self.weights(stage, source), seed=seed,
            )
            for source in spec.policies
        ]  # fmt: skip
        policies += [EndpointPolicy(endpoint, spec, seed=seed) for endpoint in spec.endpoints]
        # The stage's name is in the numbers: each round samples others.
        prefix = f"{stage.name}/"
        key = content_key([policy.key for policy in policies], rows, seed, prefix)
        path = self.run_dir / stage.name / f"responses-{key}.jsonl"
        return self._read(path) or sample_rows(
            path, rows, policies, spec, seed=seed, prefix=prefix, label=self.label(stage),
            with_digest=True, ranks=self.ranks,
        )  # fmt: skip

    def _scored(self, stage: Stage, name: str, rows: Sequence[Row], scorer: Scorer) -> list[Row]:
        key = content_key(scorer.key, list(rows))
        path = self.run_dir / stage.name / f"{name}-{key}.jsonl"
        return self._read(path) or map_rows_resumable(
            path, rows, scorer.work(rows), key=key, what="scored", label=self.label(stage),
            with_digest=True, ranks=self.ranks,
        )  # fmt: skip

    def _read(self, path: Path) -> list[Row] | None:
        return read_rows(path) if self.ranks.on_main(lambda: is_intact(path)) else None


def source_key(path: Path, name: str) -> str:
    """A key of the weights at a path, or the name of a model of the hub."""
    return weights_key(path) if path.is_dir() else name
