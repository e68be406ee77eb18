"""The same real rows, in the layout of each known format, are converted to the same internal rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.sources import RawSource, load_source

Raw = dict[str, Any]


@pytest.fixture(scope="module")
def dev(shared_dir: Path) -> Path:
    return shared_dir / "data/dev"


def rows_of(dev: Path, name: str, source: Any) -> list[Raw]:
    return load_source(source(f"{name}.jsonl"), dev, 0).rows


def adapted(rows: list[Raw], kind: Any, *, untyped: bool = False, **options: Any) -> list[Any]:
    raw = RawSource("s", rows, list(range(len(rows))), "file", untyped=untyped)
    return adapt(raw, kind=kind, audit=Audit(), **options)


def answer(text: str) -> Raw:
    return {"role": "assistant", "content": text}


def marked(messages: list[Raw]) -> str:
    """A prompt in HelpSteer2's format."""
    first, *rest = messages
    later = [f"\n<extra_id_1>{m['role'].capitalize()}\n{m['content']}" for m in rest]
    return first["content"] + "".join(later)


def nemo(row: Raw) -> Raw:
    mark = "\n<extra_id_1>"
    turns = marked(row["prompt"])
    return {
        "prompt": f"<extra_id_0>System\n{mark}User\n{turns}{mark}Assistant\n",
        "chosen_response": row["chosen"] + mark,
        "rejected_response": row["rejected"] + mark,
        "chosen_reward": row["chosen_reward"],
        "rejected_reward": row["rejected_reward"],
    }


def _exchanges(turns: list[Raw]) -> list[list[Raw]]:
    return [turns[i : i + 2] for i in range(0, len(turns), 2)]


PAIR_LAYOUTS: dict[str, Callable[[Raw], Raw]] = {
    "pairs": lambda row: {k: v for k, v in row.items() if k not in ("id", "source")},
    "ultrafeedback_binarized": lambda row: {
        "prompt": row["prompt"][-1]["content"],
        "prompt_id": "x",
        "chosen": [*row["prompt"], answer(row["chosen"])],
        "rejected": [*row["prompt"], answer(row["rejected"])],
        "messages": [*row["prompt"], answer(row["chosen"])],
        "score_chosen": row["chosen_reward"],
        "score_rejected": row["rejected_reward"],
    },
    "nemo": nemo,
    "TRL, conversational": lambda row: {
        "prompt": row["prompt"],
        "chosen": [answer(row["chosen"])],
        "rejected": [answer(row["rejected"])],
        "chosen_reward": row["chosen_reward"],
        "rejected_reward": row["rejected_reward"],
    },
    "TRL, implicit prompt": lambda row: {
        "chosen": [*row["prompt"], answer(row["chosen"])],
        "rejected": [*row["prompt"], answer(row["rejected"])],
        "chosen_reward": row["chosen_reward"],
        "rejected_reward": row["rejected_reward"],
    },
    "ShareGPT": lambda row: {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in row["prompt"]
        ],
        "chosen": {"from": "gpt", "value": row["chosen"]},
        "rejected": {"from": "gpt", "value": row["rejected"]},
        "chosen_reward": row["chosen_reward"],
        "rejected_reward": row["rejected_reward"],
    },
    "LLaMA-Factory": lambda row: {
        "system": "",
        "history": [[m["content"] for m in turns] for turns in _exchanges(row["prompt"][:-1])],
        "instruction": row["prompt"][-1]["content"],
        "input": "",
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        "chosen_reward": row["chosen_reward"],
        "rejected_reward": row["rejected_reward"],
    },
    "Axolotl": lambda row: {
        "messages": row["prompt"],
        "chosen": answer(row["chosen"]),
        "rejected": answer(row["rejected"]),
        "chosen_reward": row["chosen_reward"],
        "rejected_reward": row["rejected_reward"],
    },
    "CSV": lambda row: {
        "prompt": json.dumps(row["prompt"]),
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        "chosen_reward": str(row["chosen_reward"]),
        "rejected_reward": str(row["rejected_reward"]),
    },
    "responses": lambda row: {
        "prompt": row["prompt"],
        "responses": [row["chosen"], row["rejected"]],
        "rewards": [row["chosen_reward"], row["rejected_reward"]],
    },
}


def speaking(rows: list[Raw]) -> Iterator[Raw]:
    """Rows with only user and assistant turns: some layouts do not support other roles."""
    for row in rows:
        if all(m["role"] in ("user", "assistant") and m["content"] for m in row["prompt"]):
            yield row


@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
@pytest.mark.parametrize("name", ["pref_scored_ultrafeedback", "pref_scored_tulu_human"])
def test_scored_pairs(dev: Path, source: Any, name: str, layout: str) -> None:
    given = list(speaking(rows_of(dev, name, source)))
    assert len(given) > 800
    rows = [PAIR_LAYOUTS[layout](row) for row in given]
    found = adapted(rows, "pair", require_rewards=True, untyped=layout == "CSV")
    for row, raw in zip(found, given, strict=True):
        assert row["prompt"] == raw["prompt"]
        assert row["responses"] == [raw["chosen"], raw["rejected"]]
        assert row["rewards"] == [raw["chosen_reward"], raw["rejected_reward"]]


def helpsteer2(row: Raw) -> list[Raw]:
    same = {"prompt": marked(row["prompt"]), "correctness": 4, "verbosity": 2}
    scored = zip(row["responses"], (1, 4, 3, 2), strict=False)
    return [{**same, "response": text, "helpfulness": value} for text, value in scored]


def helpsteer3(row: Raw) -> Raw:
    first, second, *_ = row["responses"]
    return {
        "domain": "general",
        "language": "chinese",
        "context": row["prompt"],
        "response1": second,
        "response2": first,
        "overall_preference": 2,
        "individual_preference": [],
    }


def test_ranked_responses(dev: Path, source: Any) -> None:
    given = rows_of(dev, "pref_ranked_oasst_zh", source)
    plain = adapted(given, "pair")
    # The same ranks in NeMo-RL's layout, with the list in reverse order.
    nemo_rl = [
        {
            "context": row["prompt"],
            "completions": [
                {"rank": rank, "completion": [answer(text)]}
                for rank, text in reversed(list(enumerate(row["responses"])))
            ],
        }
        for row in given
    ]
    for row, other, raw in zip(plain, adapted(nemo_rl, "pair"), given, strict=True):
        assert row["prompt"] == other["prompt"] == raw["prompt"]
        assert row["responses"] == other["responses"] == raw["responses"]
        assert row["rewards"] is other["rewards"] is None
    for row, raw in zip(adapted(list(map(helpsteer3, given)), "pair"), given, strict=True):
        assert row["responses"] == raw["responses"][:2]
        assert row["rewards"] == [1.0, -1.0]


def test_rows_in_a_row_in_helpsteer2s_layout(dev: Path, source: Any) -> None:
    given = list(speaking(rows_of(dev, "pref_multi_gsm8k", source)))
    flat = [line for row in given for line in helpsteer2(row)]
    assert len(flat) == 4 * len(given)
    for row, raw in zip(adapted(flat, "pair", require_rewards=True), given, strict=True):
        assert row["prompt"] == raw["prompt"]
        assert row["responses"] == [raw["responses"][i] for i in (1, 2, 3, 0)]
        assert row["rewards"] == [4.0, 3.0, 2.0, 1.0]


def test_sft_rows(dev: Path, source: Any) -> None:
    given = [row for row in rows_of(dev, "code_sft_gpteacher", source) if len(row["messages"]) == 2]
    layouts: dict[str, Callable[[str, str], Raw]] = {
        "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
        "sharegpt": lambda q, a: {
            "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
        },
        "prompt_completion": lambda q, a: {
            "prompt": [{"role": "user", "content": q}],
            "completion": [answer(a)],
        },
    }
    for layout, make in layouts.items():
        raw = [make(*(m["content"] for m in row["messages"])) for row in given]
        for found, wanted in zip(adapted(raw, "sft"), given, strict=True):
            assert found["messages"] == wanted["messages"], layout


def test_calls_in_openais_layout_from_real_rows(dev: Path, source: Any) -> None:
    """Calls of the real rows are text; they are equal to objects with JSON arguments."""
    given = [row for row in rows_of(dev, "general_sft_mixed", source) if row.get("tools")]
    calls = 0
    for row in given:
        messages = []
        for m in row["messages"]:
            if m["role"] == "function_call":
                call = json.loads(m["content"])
                call["arguments"] = json.dumps(call["arguments"])
                messages.append(
                    {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
                )
            else:
                messages.append(m)
        (found,) = adapted([{"messages": messages, "tools": row["tools"]}], "sft")
        for old, new in zip(row["messages"], found["messages"], strict=True):
            if old["role"] == "function_call":
                assert new["tool_calls"][0]["function"] == json.loads(old["content"])
                calls += 1
    assert calls > 100


@pytest.mark.parametrize(
    ("name", "kind"),
    [("attr_hanna_human_stories", "sft"), ("scored_single_prometheus_mtbench", "sft")],
)
def test_rated_rows_are_sft_rows_too(dev: Path, source: Any, name: str, kind: str) -> None:
    given = rows_of(dev, name, source)
    for row, raw in zip(adapted(given, kind), given, strict=True):
        assert row["messages"] == [*raw["prompt"], answer(raw["response"])]
