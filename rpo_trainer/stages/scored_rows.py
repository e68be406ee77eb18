"""Rows generated during a run: responses sampled from policies, and their rewards.

They are written into the stage's directory and reused when the run resumes: `responses-KEY.jsonl` and
`generated-KEY.jsonl` (with rewards), or `scored-KEY.jsonl` if the responses were given. KEY is a digest of
everything they depend on, including the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_trainer.data import Audit
from rpo_trainer.data.judge_bias import biases
from rpo_trainer.data.resumable_rows import content_key, is_intact, map_rows_resumable, read_rows
from rpo_trainer.data.rows import Row
from rpo_trainer.recipe import ScoreSpec, Stage
from rpo_trainer.rewards.policies import (
    EndpointPolicy,
    LocalPolicy,
    Policy,
    sample_rows,
    sampling_key,
)
from rpo_trainer.rewards.prompts import EncodedPrompts
from rpo_trainer.rewards.scorers import Scorer, weights_key
from rpo_trainer.runtime.files import digest_path
from rpo_trainer.runtime.ranks import ALONE, Ranks
from rpo_trainer.stages.inputs import ScoredData
from rpo_trainer.stages.prepare import StagePreparer

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Policies(Protocol):
    """The policies that responses are sampled from."""

    def sampling_policy(self, stage: Stage, source: str) -> Loaded:
        """Load a policy that a stage samples from: its initial policy (`init`), or another source."""

    def weights_key(self, source: str) -> str:
        """Return a content key of the weights of a source (a stage, `model`, a path)."""


class ScoredRows:
    """Samples and scores the rows of the stages of one run.

    Args:
        ranks: the processes of the run; all of them must call `rows`.
    """

    def __init__(
        self, preparer: StagePreparer, run_dir: Path, policies: Policies, ranks: Ranks = ALONE
    ) -> None:
        self.preparer = preparer
        self.run_dir = run_dir
        self.policies = policies
        self.ranks = ranks

    def rows(self, stage: Stage) -> ScoredData | None:
        """Return rows with responses and rewards; None for a stage whose rows are given.

        Raises:
            DataError, Problems: rows cannot be read, or responses cannot be sampled or scored.
            ModelError: a policy or a reward model cannot be loaded.
            RunError: an endpoint refuses requests or does not answer.
        """
        data = stage.data
        if data.responses_from is not None:
            return self.rows(self.preparer.stage(data.responses_from))
        if data.score is None:
            return None
        audit, sampled = Audit(), data.generate is not None
        read = self.preparer.prompts if sampled else self.preparer.given_rows

        def read_first() -> dict[str, str]:
            read(stage, Audit())
            return self.preparer.digests.found

        # The others then find the rows in the store, by the same digests.
        self.preparer.digests.found |= self.ranks.on_main(read_first)
        with self.ranks.raise_on_all_ranks():
            rows = read(stage, audit)
            scorer = self.scorer(data.score)
            scorer.check([{**row, "responses": ["", ""]} for row in rows] if sampled else rows)
        if sampled:
            rows = self._sampled(stage, rows)
        rows, path = self._scored(stage, "generated" if sampled else "scored", rows, scorer)
        if data.score.judge is not None:
            audit.judge = biases(rows)
        return ScoredData(rows, digest_path(path).read_text(encoding="utf-8").strip(), audit)

    def scorer(self, score: ScoreSpec) -> Scorer:
        """Return the scorer of a `score` field; its reward model may be the output of a stage."""
        return self.preparer.scorer(score, self._reward_model)

    def _reward_model(self, name: str) -> tuple[str, str]:
        if any(name == stage.name for stage in self.preparer.stages):
            path = self.run_dir / name / "final"
        else:
            path = self.preparer.path(name)
            if not path.is_dir():
                return name, name  # on the hub
        return str(path), weights_key(path)

    def _sampled(self, stage: Stage, rows: list[Row]) -> list[Row]:
        spec, seed = stage.data.generate, self.preparer.seed(stage)
        assert spec is not None

        def load(source: str) -> Callable[[], Loaded]:
            return lambda: self.policies.sampling_policy(stage, source)

        encoded = EncodedPrompts()  # all policies use the recipe's tokenizer
        policies: list[Policy] = [
            LocalPolicy(
                name := stage.init if source == "init" else source, load(source), spec,
                weights=self.policies.weights_key(name), seed=seed, encoded=encoded,
            )
            for source in spec.policies
        ]  # fmt: skip
        policies += [EndpointPolicy(endpoint, spec, seed=seed) for endpoint in spec.endpoints]
        # The stage's name is part of the seeds, so that each round samples other responses.
        prefix = f"{stage.name}/"
        key = sampling_key(rows, policies, seed=seed, prefix=prefix)
        path = self.run_dir / stage.name / f"responses-{key}.jsonl"
        return self._read(path) or sample_rows(
            path, rows, policies, spec, seed=seed, prefix=prefix, key=key,
            label=self.preparer.label(stage), with_digest=True, ranks=self.ranks,
        )  # fmt: skip

    def _scored(
        self, stage: Stage, name: str, rows: Sequence[Row], scorer: Scorer
    ) -> tuple[list[Row], Path]:
        """Return the scored rows, and their file."""
        key = content_key(scorer.key, rows)
        path = self.run_dir / stage.name / f"{name}-{key}.jsonl"
        scored = self._read(path) or map_rows_resumable(
            path, rows, scorer.work(rows), key=key, what="scored", label=self.preparer.label(stage),
            with_digest=True, ranks=self.ranks,
        )  # fmt: skip
        return scored, path

    def _read(self, path: Path) -> list[Row] | None:
        return read_rows(path) if self.ranks.on_main(lambda: is_intact(path)) else None


def source_key(path: Path, name: str) -> str:
    """Return a content key of the weights at a path, or the name of a model on the hub."""
    return weights_key(path) if path.is_dir() else name
