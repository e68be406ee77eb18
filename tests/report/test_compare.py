"""`rpo-trainer compare`: figures, differing settings and overlaid curves of several runs."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rpo_trainer.cli import main
from rpo_trainer.errors import RunError
from rpo_trainer.report import build_comparison, compare_view
from rpo_trainer.report.compare import Comparison, compare_runs
from rpo_trainer.report.compare_page import overlays
from tests.raising import raises
from tests.report.test_html import Page

Make = Callable[..., Any]


@pytest.fixture
def two_runs(make_run: Make, make_stage: Make, make_evaluation: Make, tmp_path: Path) -> list[Path]:
    """Two runs that differ in reward and in the β of both RPO rounds."""
    first = make_run()
    second = tmp_path / "other"
    shutil.copytree(first, second)
    chain = json.loads((second / "chain.json").read_text())
    chain["stages"][-1]["eval"] = make_evaluation(3.5)
    (second / "chain.json").write_text(json.dumps(chain))
    text = (second / "recipe.yaml").read_text()
    (second / "recipe.yaml").write_text(text.replace("beta: 0.25", "beta: 1.0"))
    return [first, second]


def rows(comparison: Comparison) -> dict[str, list[str]]:
    return {row.key: [value.text for value in row.values] for row in comparison.figures}


def test_final_figures_with_intervals_and_the_best(two_runs: list[Path]) -> None:
    comparison = compare_runs(two_runs)
    assert comparison.names == ["my run", "other"]
    assert rows(comparison)["reward_sampled"] == ["3.87", "3.50"]
    (row,) = [row for row in comparison.figures if row.key == "reward_sampled"]
    assert [value.best for value in row.values] == [True, False]
    assert [value.interval for value in row.values] == ["3.82 to 3.92", "3.45 to 3.55"]
    assert rows(comparison)["gap"][0] == "1.56"  # 0.9625 of 0.25 · 6.5
    assert rows(comparison)["stages"] == ["3 of 3", "3 of 3"]


def test_own_held_out_pairs_without_other_figures(make_run: Make, make_stage: Make) -> None:
    metrics = [
        {"stage": "dpo", "step": 1, "eval_rewards/margins": 0.5, "eval_rewards/accuracies": 0.75}
    ]
    run_dir = make_run(stages=[make_stage("dpo", "dpo", eval={})], metrics=metrics)
    shutil.copytree(run_dir, run_dir.parent / "second")
    found = rows(compare_runs([run_dir, run_dir.parent / "second"]))
    assert found["own_gap"] == ["0.500"] * 2 and found["own_accuracy"] == ["0.750"] * 2


def test_only_what_differs_is_listed(two_runs: list[Path]) -> None:
    (difference,) = compare_runs(two_runs).differences
    assert (difference.key, difference.values) == ("stages.rpo.beta", ["0.25", "1"])


def test_stages_that_differ_alike_are_one_line(two_runs: list[Path]) -> None:
    recipe = "stages:\n" + "".join(f"  - {{name: rpo-{n}, beta: %s}}\n" for n in (1, 2))
    for run, beta in zip(two_runs, (0.5, 1), strict=True):
        (run / "recipe.yaml").write_text(recipe.replace("%s", str(beta)))
    (difference,) = compare_runs(two_runs).differences
    assert difference.key == "stages.{rpo-1,rpo-2}.beta"


def test_another_measure_has_no_best_and_a_note(two_runs: list[Path]) -> None:
    chain = json.loads((two_runs[1] / "chain.json").read_text())
    chain["stages"][-1]["eval"]["measure"] = "another"
    (two_runs[1] / "chain.json").write_text(json.dumps(chain))
    comparison = compare_runs(two_runs)
    assert not any(value.best for row in comparison.figures for value in row.values)
    assert len(comparison.notes) == 1


def test_the_terminal_shows_names_figures_and_settings(two_runs: list[Path]) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(compare_view(two_runs))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("my run", "other", "3.87", "3.82 to 3.92", "stages.rpo.beta", "0.25"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_overlays_the_curves_of_common_stages(
    two_runs: list[Path], tmp_path: Path
) -> None:
    plots = {plot.title: plot for plot in overlays(compare_runs(two_runs))}
    assert [*plots] == [
        "sft: loss", "dpo: loss", "dpo: implicit reward gap", "rpo-1: loss",
        "rpo-1: implicit reward gap",
    ]  # fmt: skip
    assert ">my run<" in plots["sft: loss"].svg and ">other<" in plots["sft: loss"].svg
    target = build_comparison(two_runs, tmp_path / "new" / "comparison.html")
    markup = target.read_text(encoding="utf-8")
    page = Page(markup)
    assert "stages.rpo.beta" in page.words() and "3.87 3.82 to 3.92" in page.words()
    assert "http" not in markup and "script" not in page.tags and str(tmp_path) not in markup
    assert len(page.ids) == len(set(page.ids))


def test_runs_of_the_same_name_are_told_apart(two_runs: list[Path], tmp_path: Path) -> None:
    moved = tmp_path / "b" / "my run"
    shutil.copytree(two_runs[0], moved)
    names = compare_runs([two_runs[0], moved]).names
    assert names == [f"{tmp_path.name}/my run", "b/my run"]


def test_the_same_run_twice_is_refused(two_runs: list[Path]) -> None:
    with raises("report.repeated-run", RunError):
        compare_runs([two_runs[0], two_runs[0] / ".." / two_runs[0].name])


def test_another_directory_is_refused(two_runs: list[Path], tmp_path: Path) -> None:
    with raises("run.not-a-run-directory", RunError):
        compare_runs([two_runs[0], tmp_path])


def test_the_command_prints_the_tables_and_writes_the_page(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "comparison.html"
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, two_runs), "--html", str(target)])
    assert ended.value.code == 0 and "<table" in target.read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert "stages.rpo.beta" in out and "3.87" in out and "comparison.html" in out


def test_one_run_is_not_enough(two_runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(two_runs[0])])
    assert ended.value.code == 2
    assert "Usage:" in capsys.readouterr().err
