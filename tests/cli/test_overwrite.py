"""`--overwrite` replaces what a command refuses without it; an invalid command deletes no results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpo_trainer.chain.run_dir import locked
from rpo_trainer.stages.prepare import DATA_FOLDER
from tests.chain import tiny
from tests.cli.helpers import call, one_stage

ROWS = [
    {"prompt": "1 + 1 = ", "ground_truth": "2", "responses": ["2", "3"]},
    {"prompt": "2 + 2 = ", "ground_truth": "4", "responses": ["5", "4"]},
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a directory, without prepared data."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and DATA_FOLDER not in path.parts
    }


# --- runs ---


def test_a_run_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run_dir = tiny.write_recipe(tmp_path, one_stage()), tmp_path / "run"
    words = ["run", recipe, "--run-dir", run_dir, "--no-report"]
    assert call(*words) == 0
    (run_dir / "notes.txt").write_text("of the old run")
    assert call(*words, "seed=9") == 2
    assert "[run.recipe-changed]" in capsys.readouterr().err
    assert call(*words, "seed=9", "--overwrite") == 0
    assert json.loads((run_dir / "chain.json").read_text())["seed"] == 9
    assert not (run_dir / "notes.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "run"}


def test_a_run_is_started_where_there_is_none(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, one_stage())
    words = ["run", recipe, "--run-dir", tmp_path / "a" / "run", "--no-report", "--overwrite"]
    assert call(*words) == 0
    assert (tmp_path / "a" / "run" / "chain.json").is_file()


@pytest.mark.parametrize(
    "mistake",
    ["stages.code.max_stepz=1", "stages.code.data.train.0={path: absent.jsonl}",
     "stages.code.warmup_steps=1"],
)  # fmt: skip
def test_a_mistake_leaves_the_old_run_as_it_is(mistake: str, tmp_path: Path) -> None:
    recipe, run_dir = tiny.write_recipe(tmp_path, one_stage()), tmp_path / "run"
    words = ["run", recipe, "--run-dir", run_dir, "--no-report"]
    assert call(*words) == 0
    before = contents(run_dir)
    assert call(*words, "--overwrite", mistake) != 0
    assert contents(run_dir) == before
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "run"}


def test_a_directory_of_other_files_is_not_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = tiny.write_recipe(tmp_path, one_stage()), tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_text("x")
    assert call("run", recipe, "--run-dir", folder, "--overwrite") == 2
    assert "[run.not-a-run-directory]" in capsys.readouterr().err
    assert contents(folder) == {"a.jpg": b"x"}


def test_a_run_in_use_is_not_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run_dir = tiny.write_recipe(tmp_path, one_stage()), tmp_path / "run"
    words = ["run", recipe, "--run-dir", run_dir, "--no-report"]
    assert call(*words) == 0
    with locked(run_dir):
        before = contents(run_dir)
        assert call(*words, "--overwrite") == 2
        assert "[run.locked]" in capsys.readouterr().err
        assert contents(run_dir) == before


def test_a_run_left_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    recipe, run_dir = tiny.write_recipe(tmp_path, one_stage()), tmp_path / "run"
    words = ["run", recipe, "--run-dir", run_dir, "--no-report"]
    assert call(*words) == 0
    before = contents(run_dir)
    run_dir.rename(tmp_path / "run.replaced")
    assert call(*words, "--overwrite", "stages.code.data.train.0={path: absent.jsonl}") != 0
    assert contents(run_dir) == before


def test_overwrite_does_not_go_with_allow_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "r.yaml", "--overwrite", "--allow-changed", "seed") == 2
    assert "--allow-changed" in capsys.readouterr().err


# --- files ---


def test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = [{**row, "rewards": [1.0, 0.0]} for row in ROWS]
    data, out = write(tmp_path / "in.jsonl", scored), tmp_path / "out.jsonl"
    out.write_text("mine")
    assert call("pairs", data, "-o", out) == 2
    shown = capsys.readouterr().err
    assert "[output.exists]" in shown and "--overwrite" in shown and out.read_text() == "mine"
    assert call("pairs", data, "-o", out, "--overwrite") == 0
    assert len(out.read_text().splitlines()) == 2


def test_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    assert call("score", data, "--verifier", "exact", "-o", out) == 0
    first = out.read_text()
    assert call("score", data, "--verifier", "partial_match", "-o", out) == 2
    assert "[output.exists]" in capsys.readouterr().err and out.read_text() == first
    words = ["score", write(tmp_path / "in.jsonl", ROWS[:1]), "--verifier", "exact", "-o", out]
    assert call(*words, "--overwrite") == 0
    assert len(out.read_text().splitlines()) == 1
    assert call(*words) == 0  # finished: the report is that of the new file


def test_unfinished_work_of_other_settings_is_replaced(tmp_path: Path) -> None:
    from rpo_trainer.data import partial_file

    data, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial_file.line("another key", 0, {"rewards": [7.0, 7.0]}))
    words = ["score", data, "--verifier", "exact", "-o", out]
    assert call(*words) == 2 and partial.exists()
    assert call(*words, "--overwrite") == 0
    assert not partial.exists()
    assert [json.loads(line)["rewards"] for line in out.read_text().splitlines()] == [
        [1.0, 0.0], [0.0, 1.0],
    ]  # fmt: skip


def test_a_mistake_leaves_the_old_file_as_it_is(tmp_path: Path) -> None:
    data, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    assert call("score", data, "--verifier", "exact", "-o", out) == 0
    before = contents(tmp_path)
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "a", "responses": ["b", "c"]}])
    assert call("score", bare, "--verifier", "exact", "-o", out, "--overwrite") != 0
    bare.unlink()
    assert contents(tmp_path) == before


def test_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "recipes"
    assert call("recipes", "--copy", folder) == 0
    (folder / "dpo.yaml").write_text("changed")
    (folder / "mine.yaml").write_text("mine")
    assert call("recipes", "--copy", folder) == 2
    assert "[option.path-exists]" in capsys.readouterr().err
    assert call("recipes", "--copy", folder, "--overwrite") == 0
    assert "stages:" in (folder / "dpo.yaml").read_text()
    assert (folder / "mine.yaml").read_text() == "mine"
    assert call("recipes", "--overwrite") == 2


# --- a command that did nothing leaves no files ---


@pytest.mark.parametrize(
    "words",
    [
        ["run", "bad.yaml", "--run-dir", "new/run"],
        ["sft", "good.yaml", "--run-dir", "new/run", "stages.code.data.train.0={path: absent.jsonl}"],
        ["check", "good.yaml", "--run-dir", "new/run"],
        ["plan", "good.yaml", "--run-dir", "new/run"],
        ["preview", "good.yaml"],
        ["status", "new"],
        ["report", "new"],
        ["score", "in.jsonl", "-o", "new/out.jsonl", "--model", "absent/model"],
        ["score", "in.jsonl", "-o", "new/out.jsonl", "--verifier", "json_schema"],
        ["score", "in.jsonl", "-o", "new/out.jsonl", "--judge", "http://127.0.0.1:9/v1",
         "--name", "m", "--retries", "0"],
        ["generate", "in.jsonl", "-o", "new/out.jsonl", "--policy", "absent/model",
         "--max-new-tokens", "3"],
        ["generate", "in.jsonl", "-o", "new/out.jsonl", "--endpoint", "http://127.0.0.1:9/v1",
         "--name", "m", "--retries", "0", "--max-new-tokens", "3"],
        ["pairs", "in.jsonl", "-o", "new/out.jsonl", "--min-chosen-reward", "5"],
        ["calibrate", "in.jsonl"],
        ["audit", "in.jsonl"],
    ],
    ids=lambda words: " ".join([words[0], *(w for w in words if w.startswith("--"))][:4]),
)  # fmt: skip
def test_nothing_is_left_behind(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_recipe(tmp_path, one_stage()).rename("good.yaml")
    Path("bad.yaml").write_text(Path("good.yaml").read_text().replace("max_steps", "max_stepz"))
    write(Path("in.jsonl"), ROWS)
    before = contents(tmp_path)
    code = call(*words)
    assert (code == 0) == (words[0] in ("check", "plan", "preview", "audit"))
    assert contents(tmp_path) == before
    assert words[0] in ("check", "plan", "run", "sft") or not Path("new").exists()
