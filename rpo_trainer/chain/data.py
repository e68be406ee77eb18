"""The rows of a stage: read, filter, replay, or generate → score → pairs; then tokenise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import xxhash
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_trainer.chain.state import write_whole
from rpo_trainer.data import Audit, add_replay, filter_rows, load_rows, tokenize_rows
from rpo_trainer.recipe import PairsSpec, RPOStage, SFTStage, SourceSpec, Stage, resolve_path
from rpo_trainer.rewards.pairs import make_preference_rows
from rpo_trainer.rewards.verifiers import get_verifier, require_ground_truth, score_rows
from rpo_trainer.trainers.checkpoint import file_digest

if TYPE_CHECKING:
    from rpo_trainer.recipe import DataSpec, EvalSpec, Recipe


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
    """xxh3-128 over tokens, masks and rewards."""
    digest = xxhash.xxh3_128()
    for row in dataset:
        parts = [row[name] for name in ("prompt_ids", "response_ids", "response_mask", "rewards")]
        digest.update(json.dumps(parts).encode())
    return str(digest.hexdigest())


def source_digests(sources: Sequence[SourceSpec], base_dir: Path) -> dict[str, str]:
    """xxh3-128 of each local file that a stage reads, by its path as written."""
    found: dict[str, str] = {}
    for source in sources:
        path = resolve_path(base_dir, source.path) if source.path else None
        if path is not None and path.is_file():
            found[str(source.path)] = file_digest(path)
    return found


def stage_seed(stage: Stage, recipe: Recipe) -> int:
    """The stage's own seed, else the recipe's."""
    return recipe.seed if stage.seed is None else stage.seed


def needs_policy(data: DataSpec) -> bool:
    """Whether the responses are sampled from the policy that seeds the stage."""
    return data.generate is not None


def build_rows(
    stage: Stage,
    base_dir: Path,
    *,
    seed: int,
    audit: Audit,
    earlier: Callable[[str], list[dict[str, Any]]],
    policy: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Training rows of a stage, not yet tokenised.

    Args:
        earlier: training rows of an earlier stage by name, for replay.
        policy: the model and tokenizer that seed the stage; needed where it generates.
        cache: folder for generated rows: read if they are there, else written, whole or not at all.
    """
    data = stage.data
    if isinstance(stage, SFTStage):
        rows = load_rows(data.train, kind="sft", base_dir=base_dir, audit=audit, seed=seed)
        if data.replay is not None:
            rows = add_replay(rows, earlier(data.replay.stage), data.replay, seed=seed, audit=audit)
        return rows
    if data.generate is not None:
        rows = _generated(stage, base_dir, seed, audit, policy, cache)
    else:
        rows = _given(stage, base_dir, seed, audit)
    if data.generate is not None or data.score is not None or data.pairs is not None:
        pairs = data.pairs or PairsSpec(select="best_worst", min_gap=0.0)
        rows = make_preference_rows(rows, select=pairs.select, min_gap=pairs.min_gap, audit=audit)
    rows = filter_rows(rows, data.filter, audit)
    if isinstance(stage, RPOStage):
        audit.check_target_gaps(rows, stage.reward_scale)
    return rows


def tokenize_stage(
    stage: Stage, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, audit: Audit
) -> datasets.Dataset:
    """The rows as tokenised examples."""
    return tokenize_rows(
        rows,
        tokenizer,
        kind="sft" if isinstance(stage, SFTStage) else "pair",
        max_length=stage.max_length,
        truncation=stage.truncation,
        audit=audit,
    )


def build_evaluation(
    stage: Stage, base_dir: Path, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> tuple[datasets.Dataset, list[dict[str, Any]], Audit] | None:
    """Held-out examples for the loss, their rows and their audit; None without `data.eval`."""
    if not stage.data.eval:
        return None
    audit = Audit()
    sft = isinstance(stage, SFTStage)
    rows = load_rows(
        stage.data.eval,
        kind="sft" if sft else "pair",
        base_dir=base_dir,
        require_rewards=isinstance(stage, RPOStage),
        audit=audit,
        seed=seed,
    )
    if not sft:
        rows = filter_rows(rows, None, audit)
    return tokenize_stage(stage, rows, tokenizer, audit), rows, audit


def evaluation_prompts(spec: EvalSpec, base_dir: Path, *, seed: int) -> list[dict[str, Any]]:
    """Prompts to sample responses to, at most `max_rows` of them."""
    rows = load_rows(spec.data, kind="prompt", base_dir=base_dir, audit=Audit(), seed=seed)
    return rows[: spec.max_rows]


def _given(stage: Stage, base_dir: Path, seed: int, audit: Audit) -> list[dict[str, Any]]:
    """Rows that come with their responses; `score` gives these rewards, in place of any of their own."""
    data = stage.data
    rows = load_rows(
        data.train,
        kind="pair",
        base_dir=base_dir,
        require_rewards=isinstance(stage, RPOStage) and data.score is None,
        audit=audit,
        seed=seed,
    )
    return rows if data.score is None else score_rows(rows, get_verifier(data.score.verifier))


def _generated(
    stage: Stage,
    base_dir: Path,
    seed: int,
    audit: Audit,
    policy: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None,
    cache: Path | None,
) -> list[dict[str, Any]]:
    data = stage.data
    assert data.generate is not None and data.score is not None  # the schema
    judge = get_verifier(data.score.verifier)
    rows = load_rows(data.train, kind="prompt", base_dir=base_dir, audit=audit, seed=seed)
    require_ground_truth(rows, judge)
    file = None if cache is None else cache / f"generated-{_key(stage, base_dir, seed)}.jsonl"
    if file is not None and file.is_file():
        scored = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        assert policy is not None  # a stage that generates has one
        from rpo_trainer.rewards.generate import sample_responses

        model, tokenizer = policy()
        spec = data.generate
        sampled = sample_responses(
            model, tokenizer, [row["prompt"] for row in rows],
            responses=spec.responses, max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k,
            batch_size=spec.batch_size, seed=seed, tools=[row.get("tools") for row in rows],
        )  # fmt: skip
        for row, samples in zip(rows, sampled, strict=True):
            row["responses"] = [sample.text for sample in samples]
        scored = score_rows(rows, judge)
        if file is not None:
            write_whole(file, "".join(json.dumps(row) + "\n" for row in scored))
    return scored


def _key(stage: Stage, base_dir: Path, seed: int) -> str:
    """What the generated rows of a stage depend on, beside the weights."""
    data = stage.data.model_dump(mode="json", include={"train", "generate", "score"})
    parts = [data, stage.init, seed, source_digests(stage.data.train, base_dir)]
    return str(xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True).encode()))
