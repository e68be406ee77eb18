from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rpo_trainer.data import (
    Audit,
    add_replay,
    filter_rows,
    load_rows,
    prepare_dataset,
    set_chat_template,
    tokenize_rows,
)
from rpo_trainer.data.counts import percent
from rpo_trainer.errors import DataError, Problems
from rpo_trainer.recipe import FilterSpec
from rpo_trainer.report.audits import read_audit
from rpo_trainer.stages.record import AuditRecord
from tests.raising import codes_of, raises

PAIR = {"prompt": "p", "chosen": "x", "rejected": "y", "chosen_reward": 2, "rejected_reward": 1}


def test_sources_are_mixed_counted_and_named(
    tmp_path: Path, source: Any, jsonl: Callable[..., str], audit: Audit
) -> None:
    (tmp_path / "sub").mkdir()
    jsonl([{"text": f"a{i}"} for i in range(10)])
    jsonl([{"text": f"b{i}"} for i in range(90)], "sub/rows.jsonl")
    specs = [
        source("rows.jsonl", weight=1.0),
        source("sub/rows.jsonl", weight=2.0, max_rows=50),
    ]
    rows = load_rows(specs, kind="sft", base_dir=tmp_path, audit=audit, seed=0)
    assert Counter(row["source"] for row in rows) == {"rows.jsonl": 10, "rows.jsonl (2)": 20}
    assert audit.read == {"rows.jsonl": 10, "rows.jsonl (2)": 90}
    assert audit.left_out == {"max_rows": {"rows.jsonl (2)": 40}, "weight": {"rows.jsonl (2)": 30}}
    assert audit.rows() == len(rows)
    assert all(int(row["response"][1:]) < 50 for row in rows)
    lines = audit.summary_lines()
    assert any("rows.jsonl (2): 44% of its rows (40)" in line for line in lines)
    assert any("rows.jsonl (2): 60% of its rows (30)" in line for line in lines)


@pytest.mark.parametrize(
    "way", ["max_rows", "weight", "joined", "replay", "held out", "max_rows of eval"]
)
def test_shares_are_of_the_rows_that_are_used(
    tmp_path: Path, source: Any, jsonl: Callable[..., str], chatml: Any, way: str
) -> None:
    """Nine of ten rows are too long, regardless of unused rows."""
    kind: Any = "pair" if way == "joined" else "sft"

    def row(i: int) -> dict[str, Any]:
        text = "a" * (300 if i // (2 if kind == "pair" else 1) % 10 < 9 else 3)
        answer = {"helpfulness": i % 2, "response": f"{text}{i % 2}"}
        return (
            {"prompt": f"q{i // 2}", **answer}
            if kind == "pair"
            else {"prompt": f"q{i}", "response": text}
        )

    path = jsonl([row(i) for i in range(400)])
    sources = [source(path, max_rows=100 if way == "max_rows" else 80 if way == "joined" else None)]
    if kind == "pair":
        sources[0].format = "helpsteer2_pairs"
    if way == "weight":
        small = jsonl([row(i) for i in range(20)], "small.jsonl")
        sources = [source(path, weight=1.0), source(small, weight=1.0)]
    audit = Audit()
    rows = load_rows(sources, kind=kind, base_dir=tmp_path, audit=audit, seed=0)
    if way == "replay":
        spec: Any = SimpleNamespace(stage="s", of="mix", fraction=0.5)
        rows = add_replay(rows, rows, spec, seed=0, audit=audit)
    if way in ("held out", "max_rows of eval"):
        kept = rows[:40]
        audit.leave_out_all("eval_fraction" if way == "held out" else "eval_max_rows", rows, kept)
        rows = kept
    assert audit.rows() == len(rows)
    limit = {"max_length": 100, "truncation": "drop"}
    dropped = len(rows) - len(tokenize_rows(rows, chatml, kind=kind, audit=audit, **limit))
    assert dropped > len(rows) / 2
    assert f"{percent(dropped, len(rows))} of the rows ({dropped} of {len(rows)} rows)" in str(
        audit.drops()
    )
    record = read_audit(AuditRecord.from_json(audit.as_dict()))
    assert (record.total, record.dropped_rows) == (len(rows), dropped)
    assert any(not concern.minor for concern in record.concerns("the rows"))


@pytest.mark.parametrize("reason", ["weight", "eval_fraction", "eval_max_rows"])
def test_warnings_are_shares_of_the_rows_that_they_count(
    tmp_path: Path, source: Any, jsonl: Callable[..., str], reason: str
) -> None:
    """Three of 40 rows have unusable rewards, every prompt occurs twice, and four rows remain."""
    pairs = [{**PAIR, "prompt": f"q{i // 2}"} for i in range(40)]
    for pair in pairs[:3]:
        pair["chosen_reward"] = "x"
    weight = 1.0 if reason == "weight" else None
    sources = [source(jsonl(pairs), weight=weight)]
    if weight is not None:
        sources.append(source(jsonl([PAIR, PAIR], "small.jsonl"), weight=0.5))
    audit = Audit()
    rows = load_rows(sources, kind="pair", base_dir=tmp_path, audit=audit, seed=0)
    if weight is None:
        rows, found = rows[:4], rows
        audit.leave_out_all(reason, found, rows)
    assert audit.rows() == len(rows) == (4 if weight is None else 6)
    read = 40 if weight is None else 42
    again = len(rows) - len({row["prompt"] for row in rows})
    record = read_audit(AuditRecord.from_json(audit.as_dict()))
    assert {noticed.key: (noticed.rows, noticed.of) for noticed in record.noticed} == {
        "unusable_rewards": (3, read),
        "duplicate_prompt": (again, None),
    }
    lines = audit.summary_lines()
    assert any(f"3 rows ({percent(3, read)}), rewards" in line for line in lines)
    assert any(f"({percent(again, len(rows))}), repeated prompt" in line for line in lines)
    assert not any("rewards" in concern.text for concern in record.concerns("the rows"))


def test_sampled_responses_are_refused_whatever_the_other_sources_name(
    tmp_path: Path, source: Any, jsonl: Callable[..., str]
) -> None:
    sampled = {"prompt": "p", "responses": ["x", "y"], "sampling": {"responses": 2}}
    specs = [source(jsonl([PAIR], "pairs.jsonl"), format="pairs"), source(jsonl([sampled]))]
    options: dict[str, Any] = {"kind": "pair", "base_dir": tmp_path, "seed": 0}
    unscored = {"where": str(tmp_path / "rows.jsonl")}
    with raises("data.unscored-responses", DataError, **unscored):
        load_rows(specs, audit=Audit(), **options)
    assert len(load_rows(specs, unscored=True, audit=Audit(), **options)) == 2
    null = [{**sampled, "rewards": [None, None]}]
    with raises("data.unscored-responses", DataError, **unscored):
        load_rows([source(jsonl(null))], audit=Audit(), **options)
    assert load_rows([source(jsonl([sampled]), format="ranked")], audit=Audit(), **options)


def test_faults_of_all_sources_come_at_once(
    tmp_path: Path, source: Any, jsonl: Callable[..., str], audit: Audit
) -> None:
    specs = [
        source(jsonl([{"text": 1}], "bad.jsonl")),
        source("absent.jsonl"),
        source(jsonl([{"text": "a"}])),
    ]
    with pytest.raises(Problems) as error:
        load_rows(specs, kind="sft", base_dir=tmp_path, audit=audit, seed=0)
    assert codes_of(error.value) == ["data.wrong-type", "data.no-such-file"]
    assert "`text`" in str(error.value) and " int," in str(error.value)
    assert error.value.exit_code == 3


def test_the_recipes_own_spec(tmp_path: Path, jsonl: Callable[..., str], audit: Audit) -> None:
    """The substitute that the other tests use has the fields of the real SourceSpec."""
    schema = pytest.importorskip("rpo_trainer.recipe.schema")
    specs = [schema.SourceSpec(path=jsonl([PAIR, PAIR]), max_rows=1)]
    rows = load_rows(specs, kind="pair", base_dir=tmp_path, audit=audit, seed=0)
    assert filter_rows(rows, schema.FilterSpec(min_gap=1.0), audit) == rows
    assert audit.read == {"rows.jsonl": 2}


def test_prepare_dataset_takes_rows_datasets_and_tokenized_data(chatml: Any) -> None:
    import datasets

    rows = [{"prompt": [{"role": "user", "content": "q"}], "chosen": "x", "rejected": "y"}] * 2
    options: dict[str, Any] = {"kind": "pair", "max_length": 50}
    from_list = prepare_dataset(rows, chatml, **options)
    from_dataset = prepare_dataset(datasets.Dataset.from_list(rows), chatml, **options)
    assert from_list.to_list() == from_dataset.to_list()
    assert from_list["id"][:] == ["dataset:0", "dataset:1"]
    assert prepare_dataset(from_list, chatml, **options) is from_list
    assert prepare_dataset(from_list.to_list(), chatml, **options).to_list() == from_list.to_list()


def test_prepare_dataset_refuses(chatml: Any) -> None:
    import datasets

    options: dict[str, Any] = {"kind": "pair", "max_length": 50}
    with raises("data.no-rows", DataError):
        prepare_dataset([], chatml, **options)
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([PAIR])})
    with raises("data.unsupported-dataset", DataError) as error:
        prepare_dataset(splits, chatml, **options)  # type: ignore[arg-type]
    assert "DatasetDict" in error.value.what
    with raises("data.bad-reward", DataError):
        prepare_dataset([{**PAIR, "chosen_reward": None}], chatml, require_rewards=True, **options)
    with raises("data.reversed-pairs", DataError):
        prepare_dataset([{**PAIR, "chosen_reward": 0}], chatml, **options)


class Own(torch.utils.data.Dataset):
    """A custom map-style data set."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


def test_prepare_dataset_takes_somebodys_own_by_number(chatml: Any) -> None:
    options: dict[str, Any] = {"kind": "pair", "max_length": 50}
    rows = [PAIR, {**PAIR, "prompt": "another"}]
    theirs: Any = Own(rows)
    made = prepare_dataset(theirs, chatml, **options)
    expected = prepare_dataset(rows, chatml, **options)
    assert [{**row, "id": ""} for row in made] == [{**row, "id": ""} for row in expected]
    tokenized: Any = Own(expected.to_list())
    assert prepare_dataset(tokenized, chatml, **options).to_list() == expected.to_list()
    with raises("data.row-not-object", DataError) as error:
        prepare_dataset(Own([PAIR, ("a", "b")]), chatml, **options)  # type: ignore[arg-type]
    assert error.value.what.startswith("row 1 ") and "tuple" in error.value.what


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter([PAIR])

    def __len__(self) -> int:
        return 1


class NoLength(torch.utils.data.Dataset):
    def __getitem__(self, number: int) -> Any:
        return PAIR


def test_prepare_dataset_refuses_what_has_no_rows_by_number(chatml: Any) -> None:
    import datasets

    options: dict[str, Any] = {"kind": "pair", "max_length": 50}
    streamed = datasets.Dataset.from_list([PAIR]).to_iterable_dataset()
    for stream in (Stream(), streamed, iter([PAIR]), (row for row in [PAIR])):
        with raises("data.unsupported-dataset", DataError) as error:
            prepare_dataset(stream, chatml, **options)  # type: ignore[arg-type]
        assert type(stream).__name__ in error.value.what
        assert "from_generator" in str(error.value.fix)
    with raises("data.unsupported-dataset", DataError) as error:
        prepare_dataset(NoLength(), chatml, **options)  # type: ignore[arg-type]
    assert "NoLength" in error.value.what and "`len()`" in str(error.value.why)


def test_prepare_dataset_logs_what_nobody_else_counts(
    plain_text: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rpo_trainer"):
        prepare_dataset([PAIR, {**PAIR, "rejected": "x"}], plain_text, kind="pair", max_length=50)
    (record,) = [record for record in caplog.records if "dropped" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert " 1 row," in record.getMessage() and "(dataset:1)" in record.getMessage()


# ---------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def dev(shared_dir: Path) -> Path:
    return shared_dir / "data/dev"


@pytest.fixture(scope="module")
def stories(shared_dir: Path) -> Any:
    from transformers import AutoTokenizer

    folder = shared_dir / "data/fixtures/models/stories260K"
    return set_chat_template(AutoTokenizer.from_pretrained(folder), "plain")


def raw_rows(dev: Path, name: str) -> list[dict[str, Any]]:
    with (dev / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("name", "rows", "ties", "identical", "empty"),
    [("pref_scored_ultrafeedback", 920, 102, 3, 2), ("pref_scored_tulu_human", 810, 261, 29, 0)],
)
def test_known_oddities_of_real_pairs_are_counted(
    dev: Path, source: Any, name: str, rows: int, ties: int, identical: int, empty: int
) -> None:
    raw = raw_rows(dev, name)
    assert ties == sum(row["chosen_reward"] == row["rejected_reward"] for row in raw)
    assert identical == sum(row["chosen"] == row["rejected"] for row in raw)

    from rpo_trainer.data.quickstart import character_tokenizer

    audit = Audit()
    tokenizer = set_chat_template(character_tokenizer(), "plain")
    loaded = load_rows(
        [source(f"{name}.jsonl")],
        kind="pair",
        base_dir=dev,
        require_rewards=True,
        audit=audit,
        seed=0,
    )
    assert audit.pairs["ties"] == ties
    assert audit.pairs["reversed"] == 0
    data = tokenize_rows(
        loaded, tokenizer, kind="pair", max_length=10**6, truncation="drop", audit=audit
    )
    dropped = {reason: count.count for reason, count in audit.dropped.items()}
    assert dropped.pop("identical_responses") == identical
    assert dropped.pop("empty_response", 0) == empty
    # unknown characters may make the tokens of two texts equal
    assert len(data) == rows - identical - empty - sum(dropped.values())
    assert sum(dropped.values()) <= 2

    spec = FilterSpec(ties="drop")
    assert len(filter_rows(loaded, spec, audit)) == rows - ties
    assert audit.dropped["tie"].count == ties


def test_real_tool_conversations(dev: Path, source: Any, stories: Any) -> None:
    audit = Audit()
    rows = load_rows(
        [source("general_sft_mixed.jsonl")], kind="sft", base_dir=dev, audit=audit, seed=0
    )
    assert len(rows) == 1344
    roles = Counter(message["role"] for row in rows for message in row["messages"])
    assert roles == {"user": 1664, "assistant": 1664 + 170, "tool": 170}
    with_tools = [row for row in rows if "tools" in row][:20]
    data = tokenize_rows(
        with_tools, stories, kind="sft", max_length=10_000, truncation="drop", audit=audit
    )
    for row, example in zip(with_tools, data, strict=True):
        turns = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        (ids,), (mask,) = example["response_ids"], example["response_mask"]
        ends = [t for t, m in zip(ids, mask, strict=True) if m and t == stories.eos_token_id]
        trained = stories.decode([t for t, m in zip(ids, mask, strict=True) if m])
        assert len(ends) == len(turns)
        assert trained.split() == "</s> ".join([*turns, ""]).split()


@pytest.mark.parametrize(
    ("name", "kind", "rewards"),
    [
        ("code_sft_mbpp", "sft", False),
        ("pref_multi_prometheus_vicuna", "pair", True),
        ("pref_pairs_unscored", "pair", False),
        ("pref_ranked_oasst_zh", "pair", False),
        ("eval_gsm8k_test", "prompt", False),
        ("eval_ifeval", "prompt", False),
    ],
)
def test_real_files_load_completely(
    dev: Path, source: Any, name: str, kind: Any, rewards: bool
) -> None:
    audit = Audit()
    rows = load_rows(
        [source(f"{name}.jsonl")],
        kind=kind,
        base_dir=dev,
        require_rewards=rewards,
        audit=audit,
        seed=0,
    )
    assert len(rows) == len(raw_rows(dev, name))
    assert audit.dropped == {}


def test_real_responses_are_best_first(dev: Path, source: Any, stories: Any) -> None:
    audit = Audit()
    rows = load_rows(
        [source("pref_multi_gsm8k.jsonl", max_rows=60)],
        kind="pair",
        base_dir=dev,
        require_rewards=True,
        audit=audit,
        seed=0,
    )
    raw = {row["id"]: row for row in raw_rows(dev, "pref_multi_gsm8k")}
    for row in rows:
        given = dict(zip(raw[row["id"]]["responses"], raw[row["id"]]["rewards"], strict=True))
        assert row["rewards"] == sorted(row["rewards"], reverse=True)
        assert row["rewards"] == [given[response] for response in row["responses"]]
    data = tokenize_rows(
        rows, stories, kind="pair", max_length=4096, truncation="drop", audit=audit
    )
    for example in data:
        prompt = stories.decode(example["prompt_ids"], skip_special_tokens=True)
        assert prompt.rstrip().endswith("Assistant:")
        assert len(example["response_ids"]) == len(example["rewards"])


def test_real_truth_labels_are_refused(dev: Path, source: Any, audit: Audit) -> None:
    with raises("data.unpaired-labels", DataError):
        load_rows(
            [source("pref_unpaired_kto.jsonl")], kind="pair", base_dir=dev, audit=audit, seed=0
        )
