from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.plots import bin_edges, running_mean, scores_plot
from rpo_trainer.report.scores import Measure
from rpo_trainer.report.stage_plots import distribution_plots, stage_plots

Make = Callable[..., Any]


def test_figures_of_each_kind(make_run: Make) -> None:
    gaps = [{"id": str(n), "implicit_gap": n / 10, "target_gap": n / 20} for n in range(30)]
    run = collect_run(make_run(gaps={"rpo-1": gaps}))
    keys = {stage.name: [plot.key for plot in stage_plots(stage)] for stage in run.stages}
    assert keys["sft"] == ["sft-loss"]
    names = ("preference", "sft", "gap", "logps", "shares", "scatter", "gaps", "sigma")
    assert keys["rpo-1"] == [f"rpo-1-{name}" for name in names]


def test_held_out_values_are_markers_that_no_line_connects(make_run: Make) -> None:
    run = collect_run(make_run())
    (plot,) = stage_plots(run.stages[0])
    root = ElementTree.fromstring(plot.svg)
    lines = [
        group
        for group in root.iter("g")
        if re.search(r"line2d_\d+$", group.get("id", ""))
        and "--second" in ElementTree.tostring(group, "unicode")
    ]
    in_axes = [group for group in lines if len(list(group.iter("use"))) == 3]
    assert len(in_axes) == 1  # the three held-out losses
    assert not any(
        "stroke-linecap" in path.get("style", "") and path.get("clip-path") for path in in_axes[0]
    )


def samples(*rewards: float, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{n}", "sampled": "x", "reward": reward, "rewards": [reward, None], **more}
        for n, reward in enumerate(rewards)
    ]


def test_distributions_before_and_after_a_stage(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    stages = [
        make_stage("sft", "sft", init="model", eval=make_evaluation(2.0)),
        make_stage("dpo", "dpo", eval={**make_evaluation(2.0), "baseline": "sft"}),
    ]
    found = {
        "sft": samples(1.0, 2.0, tokens=[3, None]),
        "dpo": samples(3.0, 5.0, tokens=[4, 6], log_ratios=[1.0, 2.0]),
    }
    run = collect_run(make_run(stages=stages, metrics=[], samples=found))
    plots = {plot.key: plot for plot in distribution_plots(run, run.stages[1])}
    assert [*plots] == ["dpo-rewards", "dpo-lengths", "dpo-kl"]
    assert "before: mean 1.5, after: mean 4" in plots["dpo-rewards"].alt
    assert "before: mean 3, after: mean 5" in plots["dpo-lengths"].alt
    assert "sft" in plots["dpo-kl"].title and "mean 1.5" in plots["dpo-kl"].alt
    first = {plot.key: plot for plot in distribution_plots(run, run.stages[0])}
    assert [*first] == ["sft-rewards", "sft-lengths"] and "before" not in first["sft-rewards"].alt


def test_other_prompts_are_no_before(make_run: Make, make_stage: Make) -> None:
    other = [{**sample, "prompt": f"other {n}"} for n, sample in enumerate(samples(1.0, 2.0))]
    run = collect_run(make_run(metrics=[], samples={"sft": other, "dpo": samples(3.0, 5.0)}))
    (plot,) = distribution_plots(run, run.stages[1])
    assert "before" not in plot.alt


def test_integers_have_bins_of_integer_width() -> None:
    assert bin_edges(1, 3, integers=True) == [0.5, 1.5, 2.5, 3.5]
    wide = bin_edges(1, 100, integers=True)
    assert {b - a for a, b in itertools.pairwise(wide)} == {5.0} and wide[-1] >= 100
    assert bin_edges(0.0, 2.4, integers=False)[:2] == [0.0, pytest.approx(0.1)]
    assert bin_edges(2.0, 2.0, integers=False) == [1.5, 2.5]


def test_svg_stands_alone_in_a_page(make_run: Make) -> None:
    run = collect_run(make_run())
    plots = [plot for stage in run.stages for plot in stage_plots(stage)]
    ids: list[str] = []
    for plot in plots:
        ElementTree.fromstring(plot.svg)
        assert plot.svg.startswith("<svg viewBox=")
        assert "http" not in plot.svg
        # Every color is a variable of the page, so that dark pages work.
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
