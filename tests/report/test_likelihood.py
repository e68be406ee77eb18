from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.verdict import judge
from tests.report.conftest import about

Make = Callable[..., Any]


def test_likelihood_decline_is_called_out_with_what_to_change(
    make_run: Make, make_preference_rows: Make
) -> None:
    rows = make_preference_rows("dpo", delta=-8.0, rejected=-12.0)
    run = collect_run(make_run(metrics=rows))
    finding = about(run, "dpo", "likelihood-decline")
    # The last tenth of 40 steps: parts 37/40 to 40/40, on average 0.9625 of the way.
    for figure in ("7.70 nats", "(38% of", "75%", "11.55"):
        assert figure in finding.text
    assert finding.level == "warn"
    assert finding.advice is not None
    assert "sft_loss_weight" in finding.advice and "(now 0)" in finding.advice
    assert "β (now 0.5)" in finding.advice
    assert judge(run).level == "warn"


def test_a_weight_that_is_set_should_be_raised(make_run: Make, make_preference_rows: Make) -> None:
    rows = make_preference_rows("rpo-1", delta=-8.0, rejected=-12.0, beta=0.25)
    advice = about(collect_run(make_run(metrics=rows)), "rpo-1", "likelihood-decline").advice
    assert advice is not None
    assert "sft_loss_weight (now 0.005" in advice


def test_a_small_fall_is_no_warning(make_run: Make, make_preference_rows: Make) -> None:
    run = collect_run(make_run(metrics=make_preference_rows("dpo", delta=-0.3)))
    assert about(run, "dpo", "likelihood-held").level == "good"


def test_chosen_delta_comes_from_the_implicit_reward_where_it_was_not_logged(
    make_run: Make, make_preference_rows: Make
) -> None:
    rows = make_preference_rows("dpo", delta=-8.0, beta=0.5)
    for row in rows:
        del row["logps/chosen_delta"]
    assert (
        "7.70 nats" in about(collect_run(make_run(metrics=rows)), "dpo", "likelihood-decline").text
    )
