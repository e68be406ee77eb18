"""`run`, `check`, `plan` and `preview` prepare the same examples, each as rarely as possible."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.chain import run_chain
from rpo_trainer.chain.check import check_recipe
from rpo_trainer.data import Audit
from rpo_trainer.plan import plan_recipe
from rpo_trainer.runtime.files import file_digest
from rpo_trainer.stages import inputs, prepare, stage_rows
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

        def spy(given: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "tokenize_rows":
                given = list(given)
            source = given[0].path if name == "load_rows" else given[0]["source"]
            counts[name][source] += 1
            return own(given, *args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    count(stage_rows, "load_rows")
    for module in (stage_rows, inputs):
        count(module, "filter_rows")
    for module in (prepare, inputs):
        count(module, "tokenize_rows")
    return counts


def test_check_plan_and_run_read_and_tokenize_the_data_once(
    counted: Counts, tmp_path: Path
) -> None:
    """Two stages and two rounds of a third on the same data; a check, a plan, a run, and a run resumed."""
    recipe = given_pairs(tmp_path, "one", "two")
    recipe["stages"].append({**recipe["stages"][1], "name": "again", "repeat": 2})
    loaded = tiny.load(tmp_path, recipe)
    check_recipe(loaded, tmp_path / "run")
    plan_recipe(loaded, tmp_path / "run")
    tiny.run(tmp_path, recipe)
    run_chain(loaded, tmp_path / "run", overwrite=True)
    names = ("one.jsonl", "one-held.jsonl", "two.jsonl", "two-held.jsonl")
    assert counted == {name: Counter(names) for name in counted}


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
    held = ["one-held.jsonl", "two-held.jsonl"]  # of which nothing is shown
    assert (set(held) <= {*counted["load_rows"]}) == (command != "preview")


def test_what_was_checked_is_what_is_trained_on_also_where_the_file_changes_in_between(
    tmp_path: Path,
) -> None:
    recipe = given_pairs(tmp_path, "one")
    expected = StagePreparer(tiny.load(tmp_path, recipe))
    fingerprint = expected.prepare(expected.stages[0]).fingerprint
    with at("begin:one", lambda: write_pairs(tmp_path / "one.jsonl", "*")):
        run_dir = tiny.run(tmp_path, recipe)
    record = tiny.records(run_dir)["one"]
    assert record["data"]["fingerprint"] == fingerprint
    # The digests are those of the rows trained on, so that the next start notices the change.
    (kept,) = [entry for entry in record["inputs"] if entry["name"] == "one.jsonl"]
    assert kept["files"]["one.jsonl"]["digest"] == record["sources"]["one.jsonl"]
    assert record["sources"]["one.jsonl"] != file_digest(tmp_path / "one.jsonl")


def test_rows_set_aside_are_neither_trained_planned_nor_shown(tmp_path: Path) -> None:
    recipe = given_pairs(tmp_path)
    write_pairs(tmp_path / "rows.jsonl", "+", 20)
    data = {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.25}
    reward = {"name": "rm", "kind": "reward", "objective": "bradley_terry", "max_steps": 1}
    recipe["stages"] = [{**reward, "data": data}]
    loaded = tiny.load(tmp_path, recipe)
    preparer = StagePreparer(loaded)
    found = preparer.prepare(preparer.stages[0])
    assert found.train is not None and found.held_out is not None
    assert (len(found.train), len(found.held_out.examples)) == (15, 5)
    held = preparer.rows(preparer.stages[0], Audit())[1] or []
    (planned,) = plan_recipe(loaded, tmp_path / "run").stages
    assert planned.examples == 15
    lines = check_recipe(loaded, tmp_path / "run")
    shown = [line.plain for line in preview(loaded, 20, colors=False)]
    assert any(line.strip().startswith("15 examples") for line in lines)
    assert any(line.startswith("15 rows") for line in shown)
    assert not any(f"row {row['id']}:" in "\n".join(shown) for row in held)


def test_a_host_that_does_not_see_the_entry_prepares_it_itself(
    counted: Counts, tmp_path: Path
) -> None:
    recipe = given_pairs(tmp_path, "one")
    first, other = (
        StagePreparer(tiny.load(tmp_path, recipe), tmp_path / name) for name in ("run", "elsewhere")
    )
    key = first.build(first.stages[0])
    here, there = first.open(first.stages[0], key), other.open(other.stages[0], key)
    assert here.train is not None and there.train is not None and here.train is not there.train
    assert here.fingerprint == there.fingerprint and here.audit.as_dict() == there.audit.as_dict()
    assert counted["load_rows"]["one.jsonl"] == 2
    again = other.open(other.stages[0], key)
    assert again.fingerprint == here.fingerprint and counted["load_rows"]["one.jsonl"] == 2


def test_a_damaged_file_is_prepared_again_with_the_same_result(tmp_path: Path) -> None:
    recipe = given_pairs(tmp_path, "one")
    run_dir = tmp_path / "run"
    expected = StagePreparer(tiny.load(tmp_path, recipe), run_dir)
    fingerprint = expected.prepare(expected.stages[0]).fingerprint
    (shard,) = (run_dir / ".data").glob("*/train/*.arrow")
    os.truncate(shard, shard.stat().st_size // 2)
    again = StagePreparer(tiny.load(tmp_path, recipe), run_dir)
    assert again.prepare(again.stages[0]).fingerprint == fingerprint


def test_a_run_removes_what_it_no_longer_uses(tmp_path: Path) -> None:
    recipe = given_pairs(tmp_path, "one")
    run_dir = tiny.run(tmp_path, recipe)
    before = {path.name for path in (run_dir / ".data").glob("*/train")}
    old = {path for path in (run_dir / ".data").iterdir() if path.is_dir()}
    for path in old:
        os.utime(path, (1, 1))
    recipe["stages"][0]["max_length"] = 50
    run_chain(tiny.load(tmp_path, recipe), run_dir, overwrite=True)
    left = {path for path in (run_dir / ".data").iterdir() if path.is_dir()}
    assert before and len([path for path in left if (path / "train").is_dir()]) == 1
    assert not [path for path in old & left if (path / "train").is_dir()]
