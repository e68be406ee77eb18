"""The rows that `score`, `generate` and `calibrate` read from a file, and their warnings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import DataError
from rpo_trainer.rewards.row_files import read_prompts, read_responses, source_of
from tests.raising import raises
from tests.rewards.policies import TEMPLATE, llama
from tests.rewards.test_commands import read, run, write
from tests.rewards.test_reward_model import save_model

ASKED = [{"role": "user", "content": "q"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


def turn(content: str = "a", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """The warnings of the commands, whose messages do not reach the root logger."""
    logger = logging.getLogger("rpo_trainer.rewards.commands")
    logger.addHandler(caplog.handler)
    yield lambda: "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASKED, turn(reasoning_content="THOUGHT", weight=1)]},
        {"prompt": ASKED, "completion": [turn(reasoning_content="THOUGHT")]},
        {"messages": [*ASKED, turn(reasoning_content="THOUGHT"), *ASKED]},
    ],
    ids=["messages", "completion", "a turn after it"],
)
def test_all_of_the_last_turn_of_sft_rows_is_scored(row: dict[str, Any], tmp_path: Path) -> None:
    found = read_responses(source_of(write(tmp_path / "s.jsonl", [row])))
    (made,) = found.rows
    assert made["responses"] == ["a"] and made["prompt"] == ASKED
    assert made["response_fields"] == [{"reasoning_content": "THOUGHT"}]
    (written,) = found.written([{**made, "rewards": [1.0]}])
    assert written["messages"][1]["reasoning_content"] == "THOUGHT" and written["reward"] == 1.0
    assert not {"prompt", "responses", "response_fields"} & {*written}


def test_a_call_at_the_end_of_sft_rows_is_refused(tmp_path: Path) -> None:
    rows = [
        {"id": "good", "messages": [*ASKED, turn()]},
        {"id": "call", "messages": [*ASKED, turn("", tool_calls=[CALL])]},
        {
            "id": "said",
            "messages": [*ASKED, turn("b", tool_calls=[CALL]), {**ASKED[0], "role": "tool"}],
        },
    ]
    with raises("data.tool-call-response", DataError) as error:
        read_responses(source_of(write(tmp_path / "s.jsonl", rows)))
    assert "2 of 3 rows, first call, said" in error.value.what


# ---------------------------------------------------------------- what is not read

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b", "ground_truth": "a"}


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({**PAIR, "question": "q"}, "question"),
        ({"prompt": "p", "response": "a", "ground_truth": "a", "question": "q"}, "question"),
        ({"prompt": "p", "responses": ["a"], "ground_truth": "a", "context": "q"}, "context"),
        ({"text": "a", "ground_truth": "a", "system": "s"}, "system"),
        ({"messages": [*ASKED, turn()], "ground_truth": "a", "notes": "q"}, "notes"),
    ],
    ids=["pair", "single", "responses", "text", "messages"],
)
def test_score_says_what_it_does_not_read(
    row: dict[str, Any], column: str, tmp_path: Path, warned: Callable[[], str]
) -> None:
    out = tmp_path / "o.jsonl"
    given = write(tmp_path / "r.jsonl", [row])
    assert run("score", given, "--verifier", "exact", "-o", out) == 0
    assert column in warned() and read(out)[0][column] == row[column]


def test_what_is_read_or_written_here_is_not_warned_of(
    tmp_path: Path, warned: Callable[[], str]
) -> None:
    """The columns of verifiers, and those that a scored or sampled row has gained."""
    row = {
        "prompt": "p", "responses": ["a", "b"], "pattern": "a", "choices": ["a"],
        "finished": [True, False], "policies": ["m", "m"], "sampling": {"seed": 0},
        "answers": ["1", "2"], "level": "hard",
    }  # fmt: skip
    out = tmp_path / "o.jsonl"
    given = write(tmp_path / "r.jsonl", [row])
    assert run("score", given, "--verifier", "regex", "-o", out) == 0
    assert run("pairs", out, "-o", tmp_path / "p.jsonl") == 0
    assert warned() == ""


def test_a_prompt_is_not_guessed_next_to_a_column_that_may_hold_it(tmp_path: Path) -> None:
    row = {"question": "q", "chosen": "x\n\nAssistant: a", "rejected": "x\n\nAssistant: b"}
    with raises("data.missing-prompt", DataError) as error:
        read_responses(source_of(write(tmp_path / "p.jsonl", [row])))
    assert "question" in error.value.what


def test_calibrate_says_what_it_does_not_read(tmp_path: Path, warned: Callable[[], str]) -> None:
    rows = [
        {**PAIR, "chosen_reward": 2.0, "rejected_reward": r, "question": "q"} for r in (0.5, 1.0)
    ]
    assert run("calibrate", write(tmp_path / "p.jsonl", rows), "--json") == 0
    assert "question" in warned()


# ---------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generate(policy: Path, folder: Path, row: dict[str, Any], *more: object) -> int:
    data = write(folder / "p.jsonl", [row])
    return run(
        "generate", data, "--policy", policy, "--max-new-tokens", 2, "--responses", 1,
        "-o", folder / "o.jsonl", *more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "notes": "q"}, "notes"),
        ({"prompt": [{**ASKED[0], "name": "n"}]}, "`name`"),
        ({"prompt": ASKED, "tools": [CALL]}, "`tools`"),
        ({"prompt": "p", "tools": [CALL]}, "`tools`"),
        ({"prompt": "p<s>", "pattern": "a"}, ""),
    ],
    ids=["column", "key", "tools", "tools of a text", "nothing"],
)
def test_generate_says_what_it_does_not_read(
    row: dict[str, Any], said: str, policy: Path, tmp_path: Path, warned: Callable[[], str]
) -> None:
    more = () if said else ("--special-tokens", "parse")
    assert generate(policy, tmp_path, row, *more) == 0
    found = warned()
    assert said in found and bool(said) == bool(found)


def test_calls_that_a_template_leaves_out_are_refused(policy: Path, tmp_path: Path) -> None:
    talk = [*ASKED, turn("", tool_calls=[CALL]), {"role": "tool", "content": "1"}]
    assert generate(policy, tmp_path, {"prompt": talk}) == 3
    assert not (tmp_path / "o.jsonl").exists()


def test_rows_of_special_tokens_need_to_say_how_they_are_read(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "<s>x"}
    assert generate(policy, tmp_path, row) == 3
    assert "special_tokens" in capsys.readouterr().err
    assert generate(policy, tmp_path, row, "--special-tokens", "parse") == 0
    (parsed,), _ = read_prompts(source_of(tmp_path / "p.jsonl", special_tokens="parse"))
    assert parsed["special_tokens"] == "parse"


def test_a_reward_model_reads_special_tokens_as_configured(tmp_path: Path) -> None:
    model = save_model(tmp_path / "rm")
    data = write(tmp_path / "p.jsonl", [{"prompt": "<s>x", "chosen": "a", "rejected": "b"}])
    found = []
    for how in ("text", "parse"):
        out = tmp_path / f"{how}.jsonl"
        assert run("score", data, "--model", model, "--special-tokens", how, "-o", out) == 0
        found.append(read(out)[0]["chosen_reward"])
    assert found[0] != found[1]
