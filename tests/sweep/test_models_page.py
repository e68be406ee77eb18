"""docs/models.md is up to date with the pinned transformers, and describes what families do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.models import main
from rpo_trainer.step import forward as step
from tests.documents import ROOT
from tests.families import FAMILIES, NOT_SWEPT, VARIANTS, VOCABULARY, tiny_config, tiny_model
from tests.sweep import run, table
from tests.sweep.measure import measure
from tests.sweep.run import Worker, all_cases, sweep
from tests.sweep.table import PAGE, documented, failures, page, rows_of

ROWS, VERSIONS = documented(PAGE.read_text(encoding="utf-8"))
installed = pytest.mark.skipif(
    transformers.__version__ != VERSIONS["transformers"],
    reason=f"docs/models.md is about transformers {VERSIONS['transformers']}",
)
# Sharing, state spaces, own classifiers; experts and sinks, chunks, ALiBi, refusals, other logits.
FAST = ("llama", "mamba", "bart")
SLOW = ("gpt_oss", "llama4", "falcon", "camembert", "granite", "qwen3_moe", "gemma2")


# --- the page ---


def test_the_page_is_about_the_pinned_transformers() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^transformers==(\S+)", pins, flags=re.MULTILINE)
    assert VERSIONS["transformers"] == pinned


@installed
def test_the_page_has_every_family_and_no_other() -> None:
    assert set(ROWS) == {*FAMILIES, *VARIANTS}


@installed
@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_family_does_what_the_page_says(name: str) -> None:
    results = [measure(name, wide, beside=not wide) for wide in (False, True)]
    assert [line for result in results for line in failures(result)] == []
    assert rows_of(results)[name] == ROWS[name]


@installed
@pytest.mark.long
def test_the_whole_sweep_is_right_and_gives_the_page(capsys: Any) -> None:
    results = list(sweep(all_cases(), jobs=2))
    assert {r["name"]: failures(r) for r in results if failures(r)} == {}
    ours, theirs = rows_of(results), ROWS
    assert {n: r for n, r in ours.items() if theirs.get(n) != r} == {}
    assert documented(page(results))[0] == theirs


def test_a_page_is_read_back() -> None:
    rows = rows_of(_records())
    assert documented(page(_records())) == (rows, {"transformers": "5.0", "torch": "2.0"})
    assert (
        rows["llama"] == rows["qwen2"] == ("trained", "shared prompts", "fused", "yes", "yes", "")
    )
    assert rows["llama4"].layout == "shared prompts; short windows: padded"
    assert rows["llama4"].lora == "no" and "LoRA: it differs" in rows["llama4"].notes
    assert rows["bert"] == table.Row("refused", notes="it differs: log-probs differ by … nats")
    assert rows["zamba"].section == "wrong" and "gradient_off" in rows["zamba"].notes


def test_a_page_requires_all_families_in_both_reaches(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in _records()))
    with pytest.raises(SystemExit):
        main(["--from", str(file), "--write"])
    assert "missing: afmoe (narrow), afmoe (wide), " in capsys.readouterr().err
    assert main(["--from", str(file)]) == 1  # one of them is wrong


def _records() -> list[dict[str, Any]]:
    def record(name: str, reach: str, **more: Any) -> dict[str, Any]:
        fine = {"layout": "shared", "fused": True, "loads_by": "config", "result": "ok"}
        beside = {
            "lora": {"result": "ok", "untrained_experts": False},
            "reward": {"result": "ok", "has_class": True},
        }
        versions = {"transformers": "5.0", "torch": "2.0"}
        own = {**fine, **(beside if reach == "narrow" else {}), **more}
        return {"name": name, "reach": reach, **versions, **own}

    refused = {"result": "refused", "reason": "it differs", "why": "log-probs differ by 0.7 nats"}
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "llama": ({}, {}),
        "qwen2": ({}, {}),
        "llama4": ({"layout": "padded", "lora": refused}, {}),
        "bert": (refused, refused),
        "zamba": ({}, {"result": "wrong", "reason": "gradient_off"}),
        "falcon+alibi": ({}, {}),
    }
    return [
        record(name, reach, **more)
        for name, both in changes.items()
        for reach, more in zip(("narrow", "wide"), both, strict=True)
    ]


# --- the small models ---


@pytest.mark.parametrize("wide", [False, True])
def test_every_family_has_a_small_config(wide: bool) -> None:
    sizes = {}
    for name in (*FAMILIES, *VARIANTS):
        if name not in NOT_SWEPT:
            text = tiny_config(name, wide).get_text_config(decoder=True)
            layers, hidden = (getattr(text, f, 0) for f in ("num_hidden_layers", "hidden_size"))
            sizes[name] = (text.vocab_size, layers, hidden)
    large = {n: s for n, s in sizes.items() if s[0] != VOCABULARY or s[1] > 8 or s[2] > 32}
    assert large == {}


def test_how_far_attention_reaches_is_an_argument() -> None:
    windows = [tiny_config("gemma2", wide).sliding_window for wide in (False, True)]
    chunks = [tiny_model("llama4", wide).config.attention_chunk_size for wide in (False, True)]
    assert (windows, chunks) == ([6, 40], [8, 40])


def test_a_small_model_is_the_same_each_time_and_hides_nothing() -> None:
    first, second, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    for a, b, c in zip(*(m.parameters() for m in (first, second, other)), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c) and a.std() > 0


# --- the sweep ---


def test_a_step_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(model: Any, inputs: Any) -> torch.Tensor:
        return 1.01 * step.token_logprobs(model, inputs)

    for user in ("step.reference", "trainers.base"):
        monkeypatch.setattr(f"rpo_trainer.{user}.token_logprobs", off)
    found = measure("llama", False, beside=False)
    assert failures(found) == ["wrong: logps_off, gradient_off"]
    assert found["logps_off"] == pytest.approx(0.01, rel=1e-3)
    assert found["gradient_off"] == pytest.approx(0.01, rel=1e-3)


def test_an_error_that_is_not_for_people_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("odd")

    monkeypatch.setattr("tests.sweep.measure.as_reward_model", broken)
    found = measure("llama", False)
    assert failures(found) == [f"reward model: crash: {found['reward']['reason']}"]
    assert found["reward"]["reason"].startswith("KeyError: 'odd' at ")


@pytest.mark.slow
def test_a_process_that_ends_or_hangs_ends_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    worker.start()
    worker.process.kill()
    worker.process.join()
    ended = worker.ask(("llama", False), 1.0)
    monkeypatch.setattr(run, "_IMPORTS", 0.0)
    late = worker.ask(("llama", False), 0.01)
    monkeypatch.undo()
    fine = worker.ask(("llama", True), 60.0)
    worker.stop()
    assert [r["result"] for r in (ended, late, fine)] == ["crash", "crash", "ok"]
    assert "exit code" in ended["reason"] and "0.01 s" in late["reason"]
