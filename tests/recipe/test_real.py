"""The recipes in recipes/real match the data that prepare.py creates, from hub rows and from local files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.chain.check import check_recipe
from rpo_trainer.recipe import expand_stages, load_recipe
from tests.documents_data import save_base_model
from tests.real_data import FUNCTIONS, REAL, WORDS, prepared, raw, script, turns

STAGES = ["code-sft", "general-sft", "dpo", "rpo-math", "rpo-code", "rpo-instructions"]
RECIPES = sorted(REAL.glob("*.yaml"))


def rows(data: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{part}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("local"))


def test_the_rows_are_the_same_in_the_form_of_the_hub(data: Path, tmp_path: Path) -> None:
    hub = prepared(tmp_path, hub=True)
    files = sorted(path.name for path in data.iterdir())
    assert files == sorted(path.name for path in hub.iterdir()) and len(files) == 11
    assert [p for p in files if (data / p).read_text() != (hub / p).read_text()] == []


def test_tasks_have_what_their_verifiers_read(data: Path) -> None:
    functions = {row["id"]: row for row in rows(data, "mbpp_train")}
    assert set(functions) == {"mbpp-1", "mbpp-520"}
    assert [row["id"] for row in rows(data, "mbpp_heldout")] == ["mbpp-11"]  # of the test split
    _, code, test = FUNCTIONS[520]
    row = functions["mbpp-520"]
    assert row["response"] == f"```python\n{code}\n```" and row["tests"] == [f"assert {test}"]
    assert row["prompt"][0]["content"].endswith(f"```python\nassert {test}\n```")
    for part in ("gsm8k_train", "gsm8k_heldout"):
        assert len(rows(data, part)) == 3
        for row in rows(data, part):
            assert re.fullmatch(r"They hold [^<>]* pens\.\n#### \d+", row["response"])
    for row in [*rows(data, "ifeval_train"), *rows(data, "ifeval_heldout")]:
        assert row["kwargs"] == [{}, {"relation": "at least", "num_words": 12}]
        assert len(row["instruction_id_list"]) == 2


def test_pairs_have_an_order_and_conversations_no_tools(data: Path) -> None:
    pairs = [*rows(data, "pairs_train"), *rows(data, "pairs_heldout")]
    assert sorted(row["chosen"] for row in pairs) == sorted(f"A {w} is a thing." for w in WORDS)
    assert all(row["rejected"].startswith("No ") for row in pairs)
    talks = [*rows(data, "general_train"), *rows(data, "general_heldout")]
    assert len(talks) == len(WORDS) and all(len(row["messages"]) == 4 for row in talks)
    assert rows(data, "code_train")[0].keys() == {"id", "messages"}


def test_no_prompt_is_trained_on_and_held_out(data: Path) -> None:
    for task in ("general", "pairs", "ifeval", "mbpp"):
        train, held = (
            {json.dumps(r.get("prompt") or r["messages"][0]) for r in rows(data, f"{task}_{part}")}
            for part in ("train", "heldout")
        )
        assert train and held and not train & held, task


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.name))
def test_a_recipe_is_ready_to_run_on_them(path: Path, data: Path, tmp_path: Path) -> None:
    """The files and columns that it names exist, and so do the columns that a verifier reads."""
    save_base_model(tmp_path / "model")
    words = [f"model.name_or_path={tmp_path / 'model'}", "defaults.warmup_steps=0"]
    loaded = load_recipe(data.parent / path.name, words)
    assert [stage.name for stage in expand_stages(loaded.recipe)] == STAGES
    check_recipe(loaded, tmp_path / "run")


def test_the_short_form_overrides_what_chain_yaml_has(data: Path) -> None:
    text = (REAL / "short.sh").read_text(encoding="utf-8")
    given = text.split("rpo_trainer run", 1)[1].split('"$@"')[0].replace("\\\n", " ")
    words = re.findall(r"(?<=\s)[\w.-]+='[^']*'|(?<=\s)[\w.-]+=[^\s\"']+", given)
    assert len(words) >= 8
    recipe = load_recipe(data.parent / "chain.yaml", [w.replace("'", "") for w in words]).recipe
    assert [stage.name for stage in expand_stages(recipe)] == STAGES


def test_what_measure_counts(data: Path) -> None:
    measure = script("measure")
    assert measure.repetition("a b c d e f") == measure.repetition("a b") == 0
    assert measure.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    tasks = [row for task in measure.TASKS for row in measure.prompts(data, task, 1)]
    right = [tasks[0]["response"], tasks[1]["response"], "word " * 12]
    answers = [{"responses": [text]} for text in right]
    assert measure.rewards(tasks, answers) == [1, 1, 1]
    assert measure.rewards(tasks, [{"responses": ["0 1"]}] * 3) == [0, 0, 0.5]


def test_the_hub_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of data sets, configs and splits are passed to `load_dataset` as they are in the table."""
    prepare, asked = script("prepare"), []

    def load(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((path, config, split, streaming))
        found = raw("code_sft_mbpp", hub=True)
        return SimpleNamespace(take=lambda most: found[:most])

    monkeypatch.setattr("datasets.load_dataset", load)
    assert len(list(prepare.read("code_sft_mbpp", None))) == 3 * len(FUNCTIONS)
    name, config, splits = prepare.LOCAL["code_sft_mbpp"]
    assert asked == [(name, config, split, True) for split in splits]
    assert prepare.conversation({"messages": turns("q", "a"), "tools": []}) is not None
