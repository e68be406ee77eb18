from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console

from rpo_trainer.report import summary_table
from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.table import comparison

Make = Callable[..., Any]


def printed(run_dir: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary_table(run_dir))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_has_all_figures_within_80_columns(make_run: Make) -> None:
    text = printed(make_run())
    row = next(line for line in text.splitlines() if line.startswith("rpo-1"))
    # exact greedy and sampled, reward greedy and sampled, NLL, step 0, time, memory
    assert " ".join(row.split()) == "rpo-1 0.600 0.500 4.37 3.87 1.250 passed 1:23 min 3.0 GiB"
    assert "…" not in text


def test_the_best_of_a_column_is_marked(make_run: Make) -> None:
    columns = {column.head: column.cells for column in comparison(collect_run(make_run()))}
    assert [cell.best for cell in columns["mean reward, sampled"]] == [False, False, True]
    assert columns["mean reward, sampled"][0].interval == "2.74 to 2.84"


def test_empty_columns_are_left_out_and_states_shown(make_run: Make, make_stage: Make) -> None:
    stages = [make_stage("sft", "sft", state="running", peak_memory_bytes=None, seconds=None)]
    run_dir = make_run(stages=stages, metrics=[])
    heads = [column.head for column in comparison(collect_run(run_dir))]
    assert heads == ["examples", "steps"]
    assert "sft (running)" in printed(run_dir)


def test_own_held_out_loss_stands_in_for_a_missing_nll(make_run: Make, make_stage: Make) -> None:
    run = collect_run(make_run(stages=[make_stage("sft", "sft"), make_stage("dpo", "dpo")]))
    columns = {column.head: column.cells for column in comparison(run)}
    assert [cell.text for cell in columns["held-out NLL, own data"]] == ["1.500", "–", "–"]


def test_markup_in_a_name_is_text(make_run: Make, make_stage: Make) -> None:
    run_dir = make_run(stages=[make_stage("[red]sft", "sft")], metrics=[])
    assert "[red]sft" in printed(run_dir)
