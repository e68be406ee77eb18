from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.samples import browse_samples

Make = Callable[..., Any]


def sample(prompt: str, reward: float | None, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "sampled": f"to {prompt}", "reward": reward, **more}


def test_what_got_worse_comes_first(make_run: Make) -> None:
    before = [
        sample("same", 2.0),
        sample("better", 1.0),
        sample("worse", 4.0),
        sample("none", None),
    ]
    after = [sample("same", 2.0), sample("better", 5.0), sample("worse", 1.5), sample("none", None)]
    browser = browse_samples(collect_run(make_run(samples={"sft": before, "rpo-1": after})))
    assert [(view.prompt, view.change) for view in browser.prompts] == [
        ("worse", -2.5), ("same", 0.0), ("better", 4.0), ("none", None),
    ]  # fmt: skip
    assert [view.number for view in browser.prompts] == [3, 1, 2, 4]
    assert browser.prompts[0].rewards == "4,1.5"


def test_the_change_is_that_of_the_mean_since_the_first_preference_stage(
    make_run: Make, make_stage: Make
) -> None:
    stages = [
        make_stage("code", "sft", init="model"),
        make_stage("sft", "sft"),
        make_stage("dpo", "dpo"),
    ]
    found = {
        name: [sample("p", rewards[0], rewards=rewards)]
        for name, rewards in (("code", [0.0, 0.0]), ("sft", [5.0, 1.0]), ("dpo", [4.0, 4.0]))
    }
    browser = browse_samples(collect_run(make_run(stages=stages, metrics=[], samples=found)))
    assert [browser.stages[i] for i in (browser.start, browser.end)] == ["sft", "dpo"]
    assert browser.prompts[0].change == 1.0


def test_the_number_of_prompts_is_given_where_not_all_are_shown(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    stages = [make_stage("sft", "sft", eval=make_evaluation(2.0))]
    rows = [sample(f"p{n}", 1.0) for n in range(3)]
    browser = browse_samples(
        collect_run(make_run(stages=stages, metrics=[], samples={"sft": rows}))
    )
    assert browser.of == 400 and len(browser.prompts) == 3


def test_long_texts_are_capped(make_run: Make) -> None:
    rows = [sample("p" * 9000, 1.0)]
    browser = browse_samples(collect_run(make_run(samples={"sft": rows})))
    assert len(browser.prompts[0].prompt) < 4100 and "5,000" in browser.prompts[0].prompt


def test_without_samples_there_is_nothing_to_browse(make_run: Make) -> None:
    assert browse_samples(collect_run(make_run())).prompts == []
