"""A synthetic run directory for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.report.collect import RunResults
from rpo_trainer.report.findings import Finding
from rpo_trainer.report.table import Cell, comparison
from rpo_trainer.report.verdict import judge

Stage = dict[str, Any]

RECIPE = """\
model: {tokenizer: characters}
defaults: {learning_rate: 3.0e-5}
stages:
  - {name: sft, kind: sft, learning_rate: 1.0e-3}
  - {name: dpo, kind: dpo, beta: 0.5, sft_loss_weight: 0.0}
  - {name: rpo, kind: rpo, repeat: 2, beta: 0.25, sft_loss_weight: 0.005, reward_scale: 1.0}
"""


def evaluation(reward: float, half_width: float = 0.05, exact: float = 0.5) -> Stage:
    return {
        "verifier": "partial_match",
        "prompts": 400,
        "responses": 1600,
        "reward_mean": reward,
        "reward_low": reward - half_width,
        "reward_high": reward + half_width,
        "exact": exact,
        "unfinished": 0.01,
        "greedy_reward_mean": reward + 0.5,
        "greedy_exact": exact + 0.1,
        "samples": [],
        "nll": 1.25,
    }


def stage(name: str, kind: str, **changes: Any) -> Stage:
    preference = kind != "sft"
    entry: Stage = {
        "name": name,
        "kind": kind,
        "state": "done",
        "init": "previous",
        "reference": "init" if preference else None,
        "seconds": 83.0,
        "examples": 1234,
        "steps": 40,
        "tokens": 56789,
        "peak_memory_bytes": 3 * 2**30,
        "data": {"fingerprint": f"{name}data0123456789abcdef", "audit": {}},
        "step0": {"loss": 0.6931, "expected": 0.6931, "ok": True} if preference else None,
        "eval": None,
        "output": {"fingerprint": f"{name}out0123456789abcdef"},
    }
    return entry | changes


def default_stages() -> list[Stage]:
    return [
        stage("sft", "sft", init="model", eval=evaluation(2.79)),
        stage("dpo", "dpo", eval=evaluation(3.41)),
        stage("rpo-1", "rpo", eval=evaluation(3.87)),
    ]


def preference_rows(
    name: str, delta: float, beta: float = 0.5, rejected: float = -6.0
) -> list[Stage]:
    """40 steps in which chosen and rejected log-probs move by `delta` and `rejected` nats."""
    rows = []
    for step in range(1, 41):
        part = step / 40
        rows.append(
            {
                "stage": name,
                "step": step,
                "loss": 0.69 - 0.2 * part,
                "loss/preference": 0.69 - 0.2 * part,
                "loss/sft": 20.0,
                "rewards/chosen": beta * delta * part,
                "rewards/rejected": beta * rejected * part,
                "rewards/margins": beta * (delta - rejected) * part,
                "rewards/accuracies": 0.5 + 0.4 * part,
                "rewards/target_gap": 2.5,
                "logps/chosen": -20 + delta * part,
                "logps/rejected": -25 + rejected * part,
                "logps/chosen_delta": delta * part,
                "logps/chosen_falling": 0.75 if delta < 0 else 0.2,
            }
        )
    return rows


def default_metrics() -> list[Stage]:
    sft: list[Stage] = [{"stage": "sft", "step": s, "loss": 3.0 - 0.05 * s} for s in range(1, 41)]
    sft += [{"stage": "sft", "step": s, "eval_loss": 3.1 - 0.04 * s} for s in (10, 20, 40)]
    return sft + preference_rows("dpo", 1.5) + preference_rows("rpo-1", 0.5, beta=0.25)


def write_lines(path: Path, rows: list[Stage]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run directory; each argument replaces a part of a finished run."""

    def make(
        stages: list[Stage] | None = None,
        metrics: list[Stage] | None = None,
        samples: dict[str, list[Stage]] | None = None,
        gaps: dict[str, list[Stage]] | None = None,
    ) -> Path:
        run = tmp_path / "my run"
        run.mkdir()
        chain = {"version": 1, "stages": default_stages() if stages is None else stages}
        (run / "chain.json").write_text(json.dumps(chain), encoding="utf-8")
        (run / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        write_lines(run / "metrics.jsonl", default_metrics() if metrics is None else metrics)
        for name, rows in (samples or {}).items():
            write_lines(run / name / "samples.jsonl", rows)
        for name, rows in (gaps or {}).items():
            write_lines(run / name / "gaps.jsonl", rows)
        return run

    return make


@pytest.fixture
def make_stage() -> Callable[..., Stage]:
    return stage


@pytest.fixture
def make_evaluation() -> Callable[..., Stage]:
    return evaluation


@pytest.fixture
def make_preference_rows() -> Callable[..., list[Stage]]:
    return preference_rows


def about(run: RunResults, stage: str, key: str) -> Finding:
    """Return the only finding of a stage with this key."""
    found = [finding for finding in judge(run).of_stage(stage) if finding.key == key]
    assert len(found) == 1, [(one.key, one.text) for one in judge(run).of_stage(stage)]
    return found[0]


def cells(run: RunResults) -> dict[str, list[Cell]]:
    """Return the cells of the comparison by the key of their column."""
    return {column.key: column.cells for column in comparison(run)}
