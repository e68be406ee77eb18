"""`run`, `check`, `plan` and `preview` prepare the same examples, each as rarely as possible."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.chain.check import check_recipe
from rpo_trainer.plan import plan_recipe
from rpo_trainer.stages import inputs, prepare
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.preview import preview
from tests.chain import tiny
from tests.chain.killer import at

Counts = dict[str, Counter[str]]


def write_pairs(path: Path, sign: str, count: int = 16) -> None:
    rows = [
        {"prompt": f"{i} {sign} 1 = ", "chosen": f"{i}", "rejected": f"{i}!"} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def given_pairs(folder: Path, *names: str) -> dict[str, Any]:
    """A recipe of DPO stages on files with these names, each with held-out rows and a filter."""
    recipe = tiny.tiny_recipe()
    stage = tiny.stage_of(recipe, "dpo")
    recipe["stages"] = []
    for name in names:
        write_pairs(folder / f"{name}.jsonl", "+")
        write_pairs(folder / f"{name}-held.jsonl", "-")
        data = {
            "train": [{"path": f"{name}.jsonl"}], "eval": [{"path": f"{name}-held.jsonl"}],
            "filter": {"ties": "drop"},
        }  # fmt: skip
        recipe["stages"].append({**stage, "name": name, "init": "model", "data": data})
    return recipe


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """How often the rows of each source are read, filtered and tokenized."""
    counts: Counts = {name: Counter() for name in ("load_rows", "filter_rows", "tokenize_rows")}

    def count(module: Any, name: str) -> None:
        own = getattr(module, name)

        def spy(first: Any, *args: Any, **kwargs: Any) -> Any:
            source = first[0].path if name == "load_rows" else first[0]["source"]
            counts[name][source] += 1
            return own(first, *args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    count(prepare, "load_rows")
    for module in (prepare, inputs):
        count(module, "filter_rows")
        count(module, "tokenize_rows")
    return counts


def test_a_run_prepares_its_first_stage_once_and_others_to_check_and_to_train(
    counted: Counts, tmp_path: Path
) -> None:
    """All stages are checked before the first trains, and only one stage's data stay in memory."""
    tiny.run(tmp_path, given_pairs(tmp_path, "one", "two"))
    once, twice = {"one.jsonl": 1, "one-held.jsonl": 1}, {"two.jsonl": 2, "two-held.jsonl": 2}
    assert counted == {name: Counter({**once, **twice}) for name in counted}


@pytest.mark.parametrize("command", ["check", "plan", "preview"])
def test_other_commands_read_each_source_once(
    command: str, counted: Counts, tmp_path: Path
) -> None:
    loaded = tiny.load(tmp_path, given_pairs(tmp_path, "one", "two"))
    if command == "check":
        check_recipe(loaded, tmp_path / "run")
    elif command == "plan":
        plan_recipe(loaded, tmp_path / "run")
    else:
        list(preview(loaded, 1))
    assert {*counted["load_rows"].values()} == {*counted["filter_rows"].values()} == {1}
    # A preview tokenizes only the rows that it shows, each untruncated and as trained.
    shown = 2 * 2 if command == "preview" else 1
    assert {*counted["tokenize_rows"].values()} == {shown}
    held = ["one-held.jsonl", "two-held.jsonl"]  # for which nothing is planned or shown
    assert (set(held) <= {*counted["load_rows"]}) == (command == "check")


def test_what_was_checked_is_what_is_trained_on_also_where_the_file_changes_in_between(
    tmp_path: Path,
) -> None:
    recipe = given_pairs(tmp_path, "one")
    expected = StagePreparer(tiny.load(tmp_path, recipe))
    fingerprint = expected.prepare(expected.stages[0]).fingerprint()
    with at("begin:one", lambda: write_pairs(tmp_path / "one.jsonl", "*")):
        run_dir = tiny.run(tmp_path, recipe)
    record = tiny.records(run_dir)["one"]
    assert record["data"]["fingerprint"] == fingerprint
    # The digest is that of the rows trained on, so that the next start notices the change.
    (kept,) = [entry for entry in record["inputs"] if entry["name"] == "one.jsonl"]
    assert kept["files"]["one.jsonl"]["digest"] != record["sources"]["one.jsonl"]


def test_inputs_that_are_not_kept_are_prepared_again(counted: Counts, tmp_path: Path) -> None:
    preparer = StagePreparer(tiny.load(tmp_path, given_pairs(tmp_path, "one", "two")))
    one, two = preparer.stages
    preparer.keep(one)
    first = preparer.prepare(one)
    assert preparer.prepare(one) is first  # once: it is no longer in memory
    assert preparer.prepare(one) is not first and preparer.prepare(two) is not preparer.prepare(two)
    assert counted["tokenize_rows"] == {"one.jsonl": 2, "two.jsonl": 2}


@pytest.mark.parametrize("score", [{"verifier": "numeric"}, None])
def test_rows_that_a_run_scores_are_not_kept(score: Any, tmp_path: Path) -> None:
    recipe = given_pairs(tmp_path, "one")
    rows = [{"prompt": "1 + 1 = ", "ground_truth": "2", "responses": ["2", "3"]}] * 3
    if score is not None:
        (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe["stages"][0]["data"]["score"] = score
    preparer = StagePreparer(tiny.load(tmp_path, recipe))
    (stage,) = preparer.stages
    preparer.keep(stage)
    assert (preparer.prepare(stage) is preparer.prepare(stage)) == (score is None)


def test_rows_set_aside_are_neither_trained_planned_nor_shown(tmp_path: Path) -> None:
    recipe = given_pairs(tmp_path)
    write_pairs(tmp_path / "rows.jsonl", "+", 20)
    data = {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.25}
    reward = {"name": "rm", "kind": "reward", "objective": "bradley_terry", "max_steps": 1}
    recipe["stages"] = [{**reward, "data": data}]
    loaded = tiny.load(tmp_path, recipe)
    preparer = StagePreparer(loaded)
    found = preparer.prepare(preparer.stages[0])
    assert found.train is not None and found.set_aside is not None
    assert (len(found.train), len(found.set_aside)) == (15, 5)
    preparer.prepare_held_out(found)
    assert found.held_out is not None and len(found.held_out.examples) == 5
    (planned,) = plan_recipe(loaded, tmp_path / "run").stages
    assert planned.examples == 15
    lines = check_recipe(loaded, tmp_path / "run")
    shown = [line.plain for line in preview(loaded, 20, colors=False)]
    assert any(line.strip().startswith("15 examples") for line in lines)
    assert any(line.startswith("15 rows") for line in shown)
    assert not any(f"row {row['id']}:" in "\n".join(shown) for row in found.set_aside)
