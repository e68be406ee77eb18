"""`--json`: one object on stdout and no other output there; errors are objects too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chain import tiny
from tests.cli.helpers import call, one_stage

ERROR_KEYS = {"code", "what", "where", "why", "fix"}


def object_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    assert all(set(error) == ERROR_KEYS for error in found["errors"])
    assert found["ok"] == (not found["errors"])
    return found


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny.write_recipe(tmp_path, one_stage())


def test_check(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", recipe, "--json", "--run-dir", tmp_path / "run") == 0
    found = object_of(capsys)
    assert found["ok"] and found["recipe"] == str(recipe) and found["run_dir"] == f"{tmp_path}/run"
    (stage,) = found["stages"]
    assert (stage["name"], stage["kind"]) == ("code", "sft")
    assert "8 examples, 2 steps" in stage["notes"] and not stage["warnings"]
    assert found["warnings"] == 0


def test_warnings_of_a_check_are_apart_from_its_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "1 + 1 = ", "response": "2"}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = one_stage()
    changed["stages"][0]["data"] = {
        "train": [{"path": "rows.jsonl"}], "eval": [{"path": "rows.jsonl"}],
    }  # fmt: skip
    assert call("check", tiny.write_recipe(tmp_path, changed), "--json") == 0
    found = object_of(capsys)
    (stage,) = found["stages"]
    assert found["warnings"] == len(stage["warnings"]) > 0
    assert not any(text.startswith("WARNING") for text in stage["warnings"])


@pytest.mark.parametrize("command", ["check", "plan"])
def test_all_errors_of_a_recipe(
    command: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["stages.code.max_stepz=1", "stages.code.learning_rate=-1"]
    assert call(command, recipe, *words, "--json") == 2
    found = object_of(capsys)
    codes = {error["code"] for error in found["errors"]}
    assert codes == {"recipe.unknown-key", "recipe.out-of-range"}
    assert all(error["where"].startswith("override ") and error["fix"] for error in found["errors"])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["check", "--json"], "option.usage"),
        (["check", "--json", "r.yaml", "--template", "t"], "option.usage"),
        (["plan", "--json", "absent.yaml"], "recipe.no-such-file"),
        (["plan", "--devices", "0", "--json", "absent.yaml"], "option.usage"),
        (["status", "--json", "absent"], "run.not-a-run-directory"),
        (["status", "--json", "--watch", "absent"], "option.usage"),
        (["audit", "--json", "absent.jsonl"], None),
        (["calibrate", "--json", "absent.jsonl"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_of_arguments(
    words: list[str], code: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) in (2, 3)
    (error,) = object_of(capsys)["errors"]
    assert code in (None, error["code"])


def test_a_bug_is_an_error_too(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rpo_trainer.chain import check

    def fail(*_: Any) -> None:
        print("said by a library")
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(check, "check_recipe", fail)
    assert call("check", recipe, "--json") == 1
    shown = capsys.readouterr()
    (error,) = json.loads(shown.out)["errors"]
    assert error["code"] == "internal.error" and "ZeroDivisionError" in error["what"]
    assert "said by a library" in shown.err and "Traceback" in shown.err


def test_plan(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", recipe, "--json", "--run-dir", tmp_path / "run") == 0
    found = object_of(capsys)
    (stage,) = found["stages"]
    assert (stage["examples"], stage["steps"], stage["upper_bound"]) == (8, 2, False)
    assert found["peak_bytes"] == stage["peak_bytes"] > stage["memory_bytes"]["weights"] > 0
    assert found["disk_bytes"] > 0 and "rpo_trainer run" in found["launch"].replace("-", "_")


def test_status(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", recipe, "--run-dir", tmp_path / "run", "--no-report") == 0
    capsys.readouterr()
    assert call("status", tmp_path / "run", "--json") == 0
    found = object_of(capsys)
    assert found["finished"] and not found["running"] and found["name"] == "run"
    (stage,) = found["stages"]
    assert (stage["state"], stage["step"], stage["steps"], stage["examples"]) == ("done", 2, 2, 8)
    assert stage["metrics"]["step"] == 2 and stage["seconds"] > 0
