"""The record of a stage: written and read with the same types, under the keys of the file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import Audit
from rpo_trainer.stages.record import (
    AuditRecord,
    ChangeRecord,
    EstimateRecord,
    EvaluationRecord,
    GapRecord,
    StageRecord,
)
from tests.chain import tiny

EVERYTHING: dict[str, Any] = {
    "name": "dpo", "kind": "dpo", "state": "done", "init": "sft", "reference": "init",
    "spec": {"name": "dpo", "beta": 0.1, "data": {"train": [{"path": "a.jsonl"}]}},
    "inputs": [
        {"key": "model.name_or_path", "name": "m", "reach": "model",
         "files": {"config.json": {"digest": "ab", "stat": [1, 2, 3, 4, 5]}, "x": {"digest": "cd"}}},
        {"key": "stages.dpo.reference", "name": "org/m", "reach": "model", "commit": "c0ffee"},
    ],
    "started": "2026-01-01T00:00:00Z", "finished": "2026-01-01T00:01:00Z", "seconds": 60.5,
    "examples": 9, "sources": {"a.jsonl": "ef"},
    "data": {
        "fingerprint": "01",
        "audit": {
            "read": {"a.jsonl": 10}, "joined": {}, "kept": {"a.jsonl": 9}, "left_out": {}, "rows": 10,
            "dropped": {"tie": {"count": 1, "examples": ["a.jsonl:3"]}},
            "warnings": {"truncated": {"count": 2, "examples": [], "of": 12}},
            "remarks": ["a remark"],
            "generation": {"a.jsonl": {"count": 1, "examples": ["a.jsonl:1"], "of": 9,
                                       "example": ["x", "y"], "text": "differs"}},
            "cut": {"a.jsonl": {"count": 1, "of": 18}}, "extra_columns": {},
            "unread_columns": {"a.jsonl": ["system"]},
            "pairs": {"rows": 9, "with_rewards": 9, "ties": 0, "reversed": 1, "gap": {"min": 0.5},
                      "mean_characters_chosen": 3.0, "mean_characters_rejected": 4.0},
            "filter": {"rows": 10, "passed": 9}, "calibration": {"reward_scale": 2.0},
            "judge": {"comparisons": 3, "consistent": 2, "equal": 0, "first_position": None,
                      "longer_wins": 0.5},
            "replay": {}, "ratings": {}, "overlap": {"rows": 3, "exact": 0, "normalized": 1},
            "max_length": None, "lengths": {"prompt": {"min": 1, "mean": 2.5}},
        },
    },
    "reward_scale": 2.0,
    "system": {
        "devices": {"CPU": 2}, "cores": 1, "threads": 1, "memory_bytes": 1024, "platform": "Linux x86_64",
        "launcher": "torchrun", "engine": "MULTI_CPU", "world_size": 2, "precision": "float32",
        "libraries": {"torch": "2.13.0"},
    },
    "step0": {"loss": 0.69, "expected": 0.69, "nats_per_token": 0.0, "ok": True},
    "warnings": [{"step": 3, "name": "chosen_falling", "text": "falls", "advice": "raise beta"}],
    "skipped": [{"step": 2, "what": "loss", "rows": ["a.jsonl:1"]}],
    "eval_before": {"eval_loss": 2.0}, "eval_after": {"eval_loss": 1.0},
    "steps": 7, "peak_memory_bytes": 1024,
    "eval": {
        "nll": 1.0, "nll_before": 2.0, "baseline": "model", "prompts": 4, "responses": 8,
        "reward_mean": 1.5, "reward_low": 1.0, "reward_high": 2.0, "unfinished": 0.0,
        "scorer": "verifier", "measure": "77", "win_rate": {"value": 0.5, "low": 0.4, "high": 0.6},
        "preferences": {"pairs": 3, "ranked": {"value": 0.5, "low": 0.0, "high": 1.0}},
        "nll_by_source": {"a": {"value": 1.0, "low": 0.5, "high": 1.5, "rows": 3}},
        "lm_eval": {"gsm8k": {"acc": {"value": 0.5, "higher_is_better": None}}},
        "of_baseline": {"prompts": 4, "reward_mean": 1.0},
        "accuracy": 0.75, "calibration": {"gap": [{"predicted": 0.1, "observed": 0.2, "count": 3}]},
        "pearson/gap": 0.5, "rmse/gap": 0.25,
    },
    "output": {"fingerprint": "99"},
    "hub": {"repo": "me/it", "commit": "c0ffee"},
}  # fmt: skip


def test_what_was_read_is_written_with_the_same_keys() -> None:
    record = StageRecord.from_json(json.loads(json.dumps(EVERYTHING)))
    assert record.to_json() == EVERYTHING
    unset = {f.name for f in dataclasses.fields(record) if getattr(record, f.name) is None}
    assert unset == {"calibration"}  # of a reward stage only
    assert record.eval is not None
    assert record.eval.win_rate == EstimateRecord(0.5, 0.4, 0.6)
    assert record.eval.agreement == {"pearson/gap": 0.5, "rmse/gap": 0.25}


def test_counts_that_were_not_made_stay_empty() -> None:
    audit = Audit().as_dict()
    record = AuditRecord.from_json(audit)
    assert record.pairs is None and record.judge is None and record.to_json() == audit


def test_a_stage_that_has_not_begun_has_little_to_say() -> None:
    record = StageRecord(name="a", kind="sft", init="model", spec={})
    assert record.to_json() == {
        "name": "a", "kind": "sft", "state": "pending", "init": "model", "reference": None, "spec": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state", "dune"), ("seconds", "long"), ("seconds", True), ("steps", 3.5), ("inputs", {}),
        ("inputs", [{"key": "a"}]), ("sources", {"a": 1}), ("data", {"audit": []}), ("output", {"a": 1}),
        ("eval", {"win_rate": 0.5}), ("warnings", ["text"]), ("skipped", [{"step": 1}]),
    ],
)  # fmt: skip
def test_another_shape_is_an_error_or_left_out(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"StageRecord\.{key}"):
        StageRecord.from_json({**EVERYTHING, key: value})
    record = StageRecord.from_json({**EVERYTHING, key: value}, lenient=True)
    others = {name: entry for name, entry in record.to_json().items() if name != key}
    assert others == {name: entry for name, entry in EVERYTHING.items() if name != key}


def test_what_is_not_finite_is_kept_for_the_chain_and_left_out_for_the_report() -> None:
    raw = {"step0": {"loss": float("nan"), "ok": False}}
    kept, shown = StageRecord.from_json(raw).step0, StageRecord.from_json(raw, lenient=True).step0
    assert kept is not None and kept.loss != kept.loss
    assert shown is not None and shown.loss is None and shown.ok is False


def test_a_line_without_what_it_needs_is_an_error() -> None:
    with pytest.raises(ValueError, match="GapRecord"):
        GapRecord.from_json({"target_gap": 1.0}, lenient=True)
    with pytest.raises(ValueError, match="ChangeRecord"):
        ChangeRecord.from_json({"key": "seed"})
    assert EvaluationRecord.from_json({}) == EvaluationRecord()


@pytest.mark.slow
def test_records_of_a_run_have_their_types(finished: Path) -> None:
    for name, raw in tiny.records(finished).items():
        record = StageRecord.from_json(raw)
        assert record.to_json() == raw, name
        assert record.output is not None and record.data is not None and record.steps
