from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.plots import running_mean, scores_plot, stage_plots
from rpo_trainer.report.scores import Measure

Make = Callable[..., Any]


def test_figures_of_each_kind(make_run: Make) -> None:
    gaps = [{"id": str(n), "implicit_gap": n / 10, "target_gap": n / 20} for n in range(30)]
    run = collect_run(make_run(gaps={"rpo-1": gaps}))
    keys = {stage.name: [plot.key for plot in stage_plots(stage)] for stage in run.stages}
    assert keys["sft"] == ["sft-loss"]
    names = ("preference", "sft", "gap", "logps", "shares", "scatter", "gaps", "sigma")
    assert keys["rpo-1"] == [f"rpo-1-{name}" for name in names]


def test_svg_stands_alone_in_a_page(make_run: Make) -> None:
    run = collect_run(make_run())
    plots = [plot for stage in run.stages for plot in stage_plots(stage)]
    ids: list[str] = []
    for plot in plots:
        ElementTree.fromstring(plot.svg)
        assert plot.svg.startswith("<svg viewBox=")
        assert "http" not in plot.svg
        # Every colour is a variable of the page, so that dark pages work.
        assert not re.search(r"(fill|stroke): #", plot.svg)
        own = re.findall(r'\bid="([^"]+)"', plot.svg)
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', plot.svg)) <= set(own)
        ids += own
    assert len(ids) == len(set(ids))


def test_alt_text_tells_the_course(make_run: Make) -> None:
    run = collect_run(make_run())
    loss = stage_plots(run.stages[0])[0]
    # First and last tenth: steps 1 to 4 and 37 to 40 of 3 - 0.05 step.
    assert "training from 2.88 to 1.07" in loss.alt


def test_stages_without_metrics_have_no_figures(make_run: Make) -> None:
    run = collect_run(make_run(metrics=[]))
    assert [stage_plots(stage) for stage in run.stages] == [[], [], []]


@pytest.mark.parametrize("values", [[1.0], [2.0] * 100, [float(n % 7) for n in range(500)]])
def test_any_length_can_be_drawn(make_run: Make, values: list[float]) -> None:
    rows = [{"stage": "sft", "step": step, "loss": v} for step, v in enumerate(values)]
    assert len(stage_plots(collect_run(make_run(metrics=rows)).stages[0])) == 1


def test_equal_gaps_can_be_drawn(make_run: Make) -> None:
    gaps = [{"id": "1", "implicit_gap": 0.0, "target_gap": 0.0}] * 3
    run = collect_run(make_run(gaps={"rpo-1": gaps}, metrics=[]))
    assert len(stage_plots(run.stages[2])) == 3


def test_scores_need_two_stages() -> None:
    one = [Measure(1.0, 0.5, 1.5), None]
    assert scores_plot(["a", "b"], one, [None, None], "reward") is None
    two = scores_plot(["a", "b"], [Measure(1.0), Measure(2.0, 1.0, 3.0)], one, "reward")
    assert two is not None
    assert ">sampled<" in two.svg


def test_running_mean() -> None:
    assert running_mean([0.0, 3.0, 6.0, 9.0], 1) == [1.5, 3.0, 6.0, 7.5]
    assert running_mean([5.0, 7.0], 0) == [5.0, 7.0]
