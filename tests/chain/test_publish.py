"""Model cards, and outputs on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from rpo_trainer.chain.card import write_card
from rpo_trainer.errors import RecipeError, StoppedBySignal
from rpo_trainer.recipe import expand_stages
from rpo_trainer.report.scores import read_scores
from rpo_trainer.stages.hub import push_output
from rpo_trainer.stages.record import StageRecord
from rpo_trainer.trainers.checkpoint import verify_manifest
from tests.chain import tiny
from tests.chain.test_stage import config
from tests.raising import raises

# --- the card ---


def parts(final: Path) -> tuple[dict[str, Any], str]:
    """Return metadata and text."""
    _, metadata, text = (final / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return YAML(typ="safe", pure=True).load(metadata), text


def test_every_output_has_a_card_that_its_manifest_covers(finished: Path) -> None:
    for stage in tiny.STAGES:
        final = finished / stage / "final"
        assert verify_manifest(final) is None
        assert "README.md" in json.loads((final / "manifest.json").read_text())["files"]
        metadata, text = parts(final)
        kind = tiny.records(finished)[stage]["kind"]
        assert metadata == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["rpo-trainer", kind],
        }
        assert f"# {stage}\n" in text and "## Versions" in text


def test_the_card_says_where_the_output_comes_from_and_how(finished: Path) -> None:
    _, text = parts(finished / "rpo-1" / "final")
    assert "stage 4 of 5" in text and "random weights → code → general → dpo → **rpo-1**" in text
    records = tiny.records(finished)
    for name in tiny.STAGES[:4]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert records[name]["data"]["fingerprint"][:12] in row
        assert records[name]["output"]["fingerprint"][:12] in row
    for setting in ("| β | 0.5 |", "| η | 1 |", "| SFT weight | 0.005 |", "| steps | 3 |"):
        assert setting in text
    excerpt = YAML(typ="safe", pure=True).load(text.split("```yaml\n")[1].split("```")[0])
    assert excerpt["name"] == "rpo-1" and excerpt["beta"] == 0.5
    assert "torch 2." in text.split("## Versions")[1]


def test_figures_files_and_the_base_model_are_in_the_card(finished_copy: Path, tmp_path: Path):
    recipe = tiny.tiny_recipe()
    recipe["model"] = {"name_or_path": "someone/some-model", "dtype": "float32"}
    recipe["stages"] = recipe["stages"][:1]
    loaded = tiny.load(tmp_path, recipe)
    (stage,) = expand_stages(loaded.recipe)
    content = tiny.records(finished_copy)["code"] | {
        "sources": {"/somewhere/data/rows.jsonl": "0123456789abcdef" * 2},
        "eval": {
            "scorer": "verifier exact", "prompts": 40, "responses": 80, "reward_mean": 3.25,
            "reward_low": 3.0, "reward_high": 3.5, "baseline": "general",
            "win_rate": {"value": 0.625, "low": 0.5, "high": 0.75},
            "lm_eval": {"gsm8k": {"exact_match (strict-match)": {"value": 0.5}}},
        },
    }  # fmt: skip
    final, record = finished_copy / "code" / "final", StageRecord.from_json(content)
    for _ in range(2):
        write_card(final, stage, [stage], {"code": record}, loaded.recipe, loaded.base_dir)
        assert verify_manifest(final) is None
    metadata, text = parts(final)
    assert metadata["base_model"] == "someone/some-model"
    assert "rows.jsonl `0123456789ab`" in text and "/somewhere" not in text
    figures = {figure.key: figure.name for figure in read_scores(record.eval).all()}
    assert f"| {figures['reward_sampled']} | 3.25 | 3.00 to 3.50 |" in text
    assert f"| {figures['win_rate']} | 0.625 | 0.500 to 0.750 |" in text
    assert "| gsm8k: exact_match (strict-match) | 0.500 |  |" in text
    assert "general" in figures["win_rate"] and "by verifier exact." in text


# --- the hub ---


class Hub:
    """A substitute for `HfApi` without a network."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    def __call__(self, token: str | None = None) -> Hub:
        self.calls.append(("token", {"token": token}))
        return self

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        self.calls.append(("create", {"repo_id": repo_id, **settings}))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, **settings: Any) -> Any:
        files = sorted(p.name for p in Path(settings["folder_path"]).iterdir())
        self.calls.append(("upload", {**settings, "files": files}))
        if self.fails is not None:
            raise self.fails
        return SimpleNamespace(oid="c0ffee")


def pushed(prefix: Any, folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    run_dir = prefix(folder, "rpo-2")
    recipe = tiny.tiny_recipe()
    arguments = {"push_to_hub": True, "hub_private_repo": True, "hub_token": "${MY_TOKEN}"}
    stage = tiny.stage_of(recipe, "rpo")
    stage["training_args"] = arguments
    state = json.loads((run_dir / "chain.json").read_text())
    for record in state["stages"]:
        if record["name"] == "rpo-1":
            record["spec"]["training_args"] = arguments
    state.pop("digest", None)
    (run_dir / "chain.json").write_text(json.dumps(state))
    tiny.run(folder, recipe)
    assert "hf_secret" not in (run_dir / "chain.json").read_text()
    assert "hf_secret" not in (run_dir / "recipe.yaml").read_text()
    return tiny.records(run_dir)["rpo-2"]


@pytest.mark.slow
def test_an_output_is_pushed_whole_with_its_card(
    prefix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    record = pushed(prefix, tmp_path, hub, monkeypatch)
    assert record["hub"] == {"repo": "me/run-rpo-2", "commit": "c0ffee"}
    (_, token), (_, created), (_, uploaded) = hub.calls  # once, and not also by the trainer
    assert token == {"token": "hf_secret"}
    assert created["repo_id"] == "run-rpo-2" and created["private"] is True
    assert {"README.md", "model.safetensors", "manifest.json"} <= set(uploaded["files"])


@pytest.mark.slow
def test_a_push_that_fails_spoils_nothing(
    prefix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = pushed(prefix, tmp_path, Hub(ConnectionError("no network\nat all")), monkeypatch)
    assert record["state"] == "done"
    assert record["hub"] == {"repo": "me/run-rpo-2", "error": "no network"}
    (warned,) = [r for r in caplog.records if r.name == "rpo_trainer.stages.hub"]
    assert warned.levelname == "WARNING" and "(me/run-rpo-2): no network" in warned.getMessage()
    assert f"`hf upload me/run-rpo-2 {tmp_path}/run/rpo-2/final`" in warned.getMessage()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "rpo-2" / "final")


def test_nothing_is_pushed_unasked_and_signals_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(StoppedBySignal("stopped by SIGTERM", code="run.stopped"))
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    assert push_output(Path(), {}, stage="dpo", run="r") is None and hub.calls == []
    with pytest.raises(StoppedBySignal):
        push_output(Path(), {"push_to_hub": True}, stage="dpo", run="r")


def test_checkpoints_are_not_pushed(tmp_path: Path) -> None:
    arguments = {"push_to_hub": True, "hub_strategy": "all_checkpoints"}
    with raises("hub.strategy", RecipeError) as caught:
        config(tmp_path, "code", training_args=arguments)
    assert caught.value.where == "stages.code.training_args"
    assert config(tmp_path, "code", training_args={"push_to_hub": True}).push_to_hub is False
