from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from rpo_trainer.report import build_report, status_view, summary_table
from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.table import comparison
from tests.report.conftest import cells

Make = Callable[..., Any]


def printed(run_dir: Any, width: int = 80, view: Callable[[Any], Any] = summary_table) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view(run_dir))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def status_of(run_dir: Path) -> Any:
    return status_view(collect_run(run_dir))


def test_the_table_has_all_figures_within_80_columns(make_run: Make) -> None:
    text = printed(make_run())
    row = next(line for line in text.splitlines() if line.startswith("rpo-1"))
    # exact greedy and sampled, reward greedy and sampled, NLL, step 0, time, memory
    assert " ".join(row.split()) == "rpo-1 0.600 0.500 4.37 3.87 1.250 passed 1:23 min 3.0 GiB"
    assert "…" not in text


def test_what_80_columns_cannot_hold_is_named(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    scored = make_stage("general-code-and-chat-sft", "sft", eval=make_evaluation(2.0))
    judge = make_stage("reward", "reward", eval={"accuracy": 0.9375}, seconds=1379.0)
    run_dir = make_run(stages=[scored, judge], metrics=[])
    text = printed(run_dir)
    assert "…" not in text and "0.938" in text and "22:59 min" in text and "GiB" not in text
    heads = {column.key: column.head for column in comparison(collect_run(run_dir))}
    left_out = [heads[key] for key in ("peak_memory", "exact_greedy", "reward_greedy")]
    assert f"{'; '.join(left_out)} (see rpo-trainer report)" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_the_best_of_a_column_is_marked(make_run: Make) -> None:
    rewards = cells(collect_run(make_run()))["reward_sampled"]
    assert [cell.best for cell in rewards] == [False, False, True]
    assert rewards[0].interval == "2.74 to 2.84"


def test_empty_columns_are_left_out_and_states_shown(make_run: Make, make_stage: Make) -> None:
    stages = [make_stage("sft", "sft", state="running", peak_memory_bytes=None, seconds=None)]
    run_dir = make_run(stages=stages, metrics=[])
    assert [*cells(collect_run(run_dir))] == ["examples", "steps", "time"]
    assert "running" in printed(run_dir)


def test_where_nothing_was_held_out_the_table_says_how_training_ended(
    make_run: Make, make_stage: Make, make_preference_rows: Make
) -> None:
    stages = [make_stage("sft", "sft", eval={}), make_stage("dpo", "dpo", eval={})]
    losses = [{"stage": "sft", "step": step, "loss": 2.0 / step} for step in range(1, 11)]
    metrics = [*losses, *make_preference_rows("dpo", delta=-4.0)]
    run_dir = make_run(stages=stages, metrics=metrics)
    columns = cells(collect_run(run_dir))
    assert columns["loss"][0].text == "0.200"
    assert columns["gap"][0].text == "–"
    # The last tenth of 40 steps: on average 0.9625 of the way.
    assert [cell.text for cell in columns["chosen_delta"]] == ["–", "−3.850"]
    page = build_report(run_dir).read_text(encoding="utf-8")
    assert "Nothing was measured on held-out data" in page and "Bold: the best stage" not in page
    text = printed(run_dir)
    assert "Δchosen" in text and max(map(len, text.splitlines())) <= 80


def test_where_something_was_held_out_training_is_left_to_its_curves(
    make_run: Make, tmp_path: Path
) -> None:
    keys = set(cells(collect_run(make_run())))
    assert keys and not keys & {"loss", "gap", "preferred", "chosen_delta"}
    page = build_report(tmp_path / "my run").read_text(encoding="utf-8")
    assert "Bold: the best stage" in page and "Nothing was measured on held-out data" not in page


def test_an_unfinished_chain_fits_80_columns_too(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    done = make_stage("general-sft", "sft", eval=make_evaluation(2.0), seconds=752.0)
    stages = [done, *(make_stage(f"rpo-{n}", "rpo", state="pending") for n in range(3))]
    text = printed(make_run(stages=stages, metrics=[]))
    assert "…" not in text and "12:32 min" in text and text.count("pending") == 3


def test_a_stage_that_has_begun_says_how_far_it_is(make_run: Make, make_stage: Make) -> None:
    stages = [make_stage("sft", "sft", state="running", peak_memory_bytes=None, seconds=None)]
    run_dir = make_run(stages=stages, metrics=[{"stage": "sft", "step": 126, "loss": 0.5}])
    assert "step 126" in printed(run_dir)


def test_own_held_out_loss_stands_in_for_a_missing_nll(make_run: Make, make_stage: Make) -> None:
    run = collect_run(make_run(stages=[make_stage("sft", "sft"), make_stage("dpo", "dpo")]))
    assert [cell.text for cell in cells(run)["nll"]] == ["1.500", "–", "–"]


def test_pairs_that_a_stage_held_out_are_shown(make_run: Make, make_stage: Make) -> None:
    metrics = [
        {"stage": "dpo", "step": step, "eval_rewards/margins": gap, "eval_rewards/accuracies": 0.75}
        for step, gap in ((1, 0.0), (2, 0.5))
    ]
    stages = [make_stage("dpo", "dpo", eval={})]
    run_dir = make_run(stages=stages, metrics=metrics)
    columns = cells(collect_run(run_dir))
    assert (columns["own_gap"][0].text, columns["own_accuracy"][0].text) == ("0.500", "0.750")
    assert "0.500" in printed(run_dir) and "loss" not in columns


def test_markup_in_a_name_is_text(make_run: Make, make_stage: Make) -> None:
    run_dir = make_run(stages=[make_stage("[red]sft", "sft")], metrics=[])
    assert "[red]sft" in printed(run_dir)


MORE = {
    "baseline": "sft",
    "win_rate": {"value": 0.625, "low": 0.55, "high": 0.7},
    "preferences": {
        "pairs": 40,
        "accuracy": {"value": 0.7, "low": 0.6, "high": 0.8},
        "margin": {"value": 3.25, "low": 1.0, "high": 5.0},
    },
    "nll_by_source": {"a.jsonl": {"value": 1.5, "low": 1.25, "high": 1.75, "rows": 9}},
    "lm_eval": {
        "gsm8k": {"exact_match": {"value": 0.4, "low": 0.3, "high": 0.5, "higher_is_better": True}},
        "wikitext": {"perplexity": {"value": 9.0, "higher_is_better": False}},
    },
}


def test_further_figures_have_columns_of_their_own(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    more_perplexed = {"perplexity": {"value": 12.0, "higher_is_better": False}}
    worse = {**MORE, "lm_eval": {"wikitext": more_perplexed}}
    stages = [
        make_stage("sft", "sft", init="model", eval=make_evaluation(2.0)),
        make_stage("dpo", "dpo", eval={**make_evaluation(2.5), **MORE}),
        make_stage("rpo", "rpo", eval={**make_evaluation(2.6), **worse}),
    ]
    run_dir = make_run(stages=stages, metrics=[])
    columns = cells(collect_run(run_dir))
    wins = columns["win_rate"]
    assert [cell.text for cell in wins] == ["–", "0.625", "0.625"]
    assert wins[1].interval == "0.550 to 0.700"
    assert columns["preferences.margin"][1].text == "3.25"
    assert columns["preferences.accuracy"][1].interval == "0.600 to 0.800"
    assert columns["nll.a.jsonl"][1].text == "1.500"
    assert [cell.text for cell in columns["gsm8k.exact_match"]] == ["–", "0.400", "–"]
    assert [cell.best for cell in columns["wikitext.perplexity"]] == [False, True, False]
    text = printed(run_dir)
    assert "win" not in text and "gsm8k" not in text  # 80 columns fit the main figures only


def test_stages_with_baselines_of_their_own_say_which(make_run: Make, make_stage: Make) -> None:
    other = {**MORE, "baseline": "model"}
    stages = [make_stage("dpo", "dpo", eval=MORE), make_stage("rpo", "rpo", eval=other)]
    run_dir = make_run(stages=stages, metrics=[])
    intervals = [cell.interval for cell in cells(collect_run(run_dir))["win_rate"]]
    assert intervals == ["0.550 to 0.700 against sft", "0.550 to 0.700 against model"]
    assert "0.625" in printed(run_dir)  # there is no reward with more information


def test_held_out_pairs_are_in_the_terminal_where_no_reward_is(
    make_run: Make, make_stage: Make
) -> None:
    pairs = {"preferences": MORE["preferences"], "baseline": "sft"}
    stages = [make_stage("sft", "sft", eval=None), make_stage("dpo", "dpo", eval=pairs)]
    text = printed(make_run(stages=stages, metrics=[]))
    row = next(line for line in text.splitlines() if line.startswith("dpo"))
    assert "3.25" in row and "…" not in text
    assert "accuracy" in text and "gap," in text


def test_a_status_is_one_screen_with_the_last_warnings(make_run: Make, make_stage: Make) -> None:
    def warning(step: int) -> dict[str, Any]:
        return {"step": step, "text": f"margins are {step}", "advice": "raise beta"}

    stages = [make_stage("dpo", "dpo", warnings=[warning(step) for step in range(10, 70, 10)])]
    text = printed(make_run(stages=stages, metrics=[]), view=status_of)
    assert "2 earlier warnings (see rpo-trainer report)" in text
    assert "dpo, step 60: margins are 60. Try: raise beta." in text
    assert "margins are 30" in text and "margins are 20" not in text
    assert len(text.splitlines()) < 24


def test_a_status_without_warnings_is_the_table(make_run: Make) -> None:
    run_dir = make_run()
    assert printed(run_dir, view=status_of) == printed(run_dir)
