"""The command line: every user error has its exit code and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer import errors
from rpo_trainer.cli import commands as cli
from tests.chain import tiny
from tests.cli.helpers import call, one_stage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny.write_recipe(tmp_path, one_stage())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    path = tiny.write_recipe(folder, one_stage())
    assert call("run", path, "--run-dir", folder / "run", "--no-report") == 0
    return folder / "run"


# --- without torch ---


@pytest.mark.parametrize(
    "words",
    [["--help"], ["run", "--help"], ["check", "-h"], ["--version"], ["schema"], ["dpo", "--help"],
     ["run", "absent.yaml"], ["status", "absent"], ["nonsense"]],
    ids=" ".join,
)  # fmt: skip
def test_light_commands_do_not_import_torch(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from rpo_trainer.cli import commands as cli\n"
        f"try: cli.main({words!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rpo_trainer", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    for command in ("run", "check", "status", "report", "schema", "sft", "dpo", "rpo"):
        assert f"\n  {command} " in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "rpo_trainer", "run", "absent.yaml"], capture_output=True,
        text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: absent.yaml: " in done.stderr and not done.stdout
    assert "[recipe.no-such-file]" in done.stderr
    assert "Traceback" not in done.stderr


# --- arguments ---


@pytest.mark.parametrize(
    "words",
    [
        ["stages.code.learning_rate=0.25", "seed=9"],
        ["--stages.code.learning_rate", "0.25", "--seed", "9"],
        ["--stages.code.learning_rate=0.25", "seed=9"],
    ],
    ids=["key=value", "--key value", "--key=value"],
)
@pytest.mark.parametrize("command", [["run"], ["sft", "--stage", "code"]], ids=["run", "sft"])
def test_overrides_reach_the_recipe(
    command: list[str], words: list[str], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpo_trainer import chain

    seen: list[Any] = []

    def spy(loaded: Any, run_dir: Any, *, only: Any = None, **_: Any) -> Path:
        seen.append((loaded.recipe, run_dir, only))
        raise errors.RunError("far enough", code="run.test")

    monkeypatch.setattr(chain, "run_chain", spy)
    first, *options = command
    assert call(first, recipe, *options, "--run-dir", "x", *words) == 2
    ((got, run_dir, only),) = seen
    assert got.seed == 9 and got.stages[0].learning_rate == 0.25
    assert run_dir == Path("x")
    assert only == (None if first == "run" else {"code"})


def test_overrides_reach_check(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", recipe, "stages.code.max_steps=77") == 0
    shown = capsys.readouterr().out
    assert "8 examples, 77 steps" in shown and shown.endswith(f"{recipe}: OK\n")
    assert call("check", recipe, "stages.code.max_stepz=77") == 2
    shown = capsys.readouterr().err
    assert "[recipe.unknown-key]" in shown and "max_stepz" in shown


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["run"], ["status"], ["run", "a.yaml", "--run-dir"], ["status", "a", "b"], []],
    ids=["command", "no recipe", "no run", "no value", "too many", "nothing"],
)
def test_wrong_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words) == 2
    shown = capsys.readouterr().err
    assert ("Error: " in shown or "Usage: " in shown) and "Traceback" not in shown


def test_an_option_that_is_neither_ours_nor_of_the_recipe(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", recipe, "--run_dirr", "x") == 2
    assert "run_dirr" in capsys.readouterr().err


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "stages", "seed"} <= set(schema["properties"])


def test_stage_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write_recipe(tmp_path, tiny.tiny_recipe())
    for words, names in (
        (["sft"], ["2 sft"]),
        (["rpo", "--stage", "dpo"], ["'dpo'"]),
        (["dpo"], ["dpo", "general"]),
    ):
        command, *options = words
        assert call(command, path, "--run-dir", tmp_path / "run", *options) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and all(name in shown for name in names)


# --- failures ---


def subclasses(kind: type) -> list[type]:
    return [kind, *(one for child in kind.__subclasses__() for one in subclasses(child))]


EXIT_CODES = {
    "RPOTrainerError": 1, "RecipeError": 2, "ModelError": 2, "RunError": 2, "StepZeroError": 2,
    "DataError": 3, "NonFiniteError": 4, "StoppedBySignal": 75, "Problems": 3,
}  # fmt: skip


@pytest.mark.parametrize("kind", subclasses(errors.RPOTrainerError), ids=lambda k: k.__name__)
def test_every_error_has_its_exit_code_and_no_traceback(
    kind: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = (
        errors.Problems(
            [
                errors.RecipeError("this", code="recipe.test"),
                errors.DataError("that", code="data.test", where="a.jsonl:3"),
            ]
        )
        if kind is errors.Problems
        else kind("this", code="run.test", where="here", why="because", fix="do that")
    )

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert call("run", "recipe.yaml") == EXIT_CODES.get(kind.__name__, kind.exit_code)
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and "this" in shown.err
    assert "Traceback" not in shown.err and not shown.out
    if kind is errors.Problems:
        assert "this [recipe.test]\na.jsonl:3: that [data.test]\n2 " in shown.err
    else:
        assert "here: this [run.test]\n  why: because\n  fix: do that" in shown.err


def test_control_c_before_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert call("run", "recipe.yaml") == 130
    assert capsys.readouterr().err.strip() == "stopped"


def test_a_bug_is_shown_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(cli, "_run", fail)
    assert call("run", "recipe.yaml") == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("ZeroDivisionError: of ours\n")


# --- runs ---


def test_a_finished_run_without_the_report_extra_is_done(
    recipe: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "rpo_trainer.report.html", raising=False)
    assert call("run", recipe, "--run-dir", finished) == 0
    shown = capsys.readouterr().err
    assert "no report: " in shown and "jinja2" in shown


def test_run_shows_a_table_and_again_is_done(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.content(finished)
    recipe = finished.parent / "recipe.yaml"
    assert call("run", recipe, "--run-dir", finished, "--no-report") == 0
    shown = capsys.readouterr()
    assert "code" in shown.out and "finished" in shown.err
    assert tiny.content(finished) == before


def test_progress_is_plain_without_a_terminal(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", recipe, "--run-dir", tmp_path / "run") == 0
    shown = capsys.readouterr()
    assert "[1/1 code] step 2/2  loss " in shown.err
    assert "[1/1 code] finished" in shown.err
    assert "it/s]" not in shown.err  # no bars of other libraries
    assert "Warning" not in shown.err
    assert (tmp_path / "run" / "report.html").is_file()
    assert "report: " in shown.out


def test_status_and_report_of_a_finished_run(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("status", finished) == 0
    assert "code" in capsys.readouterr().out
    assert call("report", finished) == 0
    assert "report.html" in capsys.readouterr().out
    assert "<html" in (finished / "report.html").read_text().lower()


def test_status_and_report_of_an_unfinished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.chain.killer import run_until

    run_until("step:code:1", lambda: tiny.run(tmp_path, one_stage()))
    assert call("status", tmp_path / "run") == 0
    assert "step 1" in capsys.readouterr().out
    assert call("report", tmp_path / "run") == 0
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("command", ["status", "report"])
def test_what_is_no_run_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert call(command, folder) == 2
        shown = capsys.readouterr().err
        assert str(folder) in shown and "Traceback" not in shown
