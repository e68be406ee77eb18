"""`generate` and `score` on two ranks write the file of one process, also after an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rpo_trainer.data import resumable_rows
from rpo_trainer.data.partial_file import partial_path
from rpo_trainer.data.quickstart import character_tokenizer
from tests.distributed.launch import run, torchrun
from tests.rewards.policies import llama
from tests.rewards.test_commands import read, write
from tests.rewards.test_commands import run as alone
from tests.rewards.test_reward_model import save_model

pytestmark = pytest.mark.slow


def together(*command: object, failing: bool = False) -> str:
    ended = run(torchrun("rpo_trainer", *map(str, command)))
    assert bool(ended.returncode) == failing, ended.stdout[-5000:]
    return ended.stdout


def interrupted(out: Path, command: list[object], keep: slice) -> None:
    """The partial file of a process that was killed after some rows."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with mock.patch.object(resumable_rows, "write_rows", killed):
        assert alone(*command, out) == 130
    lines = partial_path(out).read_text().splitlines(keepends=True)
    partial_path(out).write_text("".join(lines[keep]))


def test_two_ranks_write_the_file_of_one(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "policy")
    character_tokenizer().save_pretrained(tmp_path / "policy")
    prompts = [{"id": f"q{i}", "prompt": f"{i} + {i * i} = "} for i in range(10)]
    command = ["generate", write(tmp_path / "prompts.jsonl", prompts), "--max-new-tokens", 6]
    command += ["--policy", tmp_path / "policy", "--responses", 2, "--batch-size", 4, "-o"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert alone(*command, one) == 0
    interrupted(two, command, slice(2, 5))
    said = together(*command, two)
    assert two.read_bytes() == one.read_bytes()
    assert said.count("20 responses to 10 prompts") == 1 and "3 of 10 rows already sampled" in said

    command = ["score", one, "--model", save_model(tmp_path / "rm"), "--batch-tokens", 60, "-o"]
    one, two = tmp_path / "one-scored.jsonl", tmp_path / "two-scored.jsonl"
    assert alone(*command, one) == 0
    interrupted(two, command, slice(0, 4))
    said = together(*command, two)
    assert two.read_bytes() == one.read_bytes()
    assert said.count("10 rows scored:") == 1 and "4 of 10 rows already scored" in said
    assert not [
        path for path in tmp_path.iterdir() if "partial" in path.name or "lock" in path.name
    ]

    rows = [{name: row[name] for name in ("id", "prompt", "responses")} for row in read(one)]
    rows.append({"id": "long", "prompt": "p", "responses": ["x" * 80, "y"]})
    command[1], failed = write(tmp_path / "rows.jsonl", rows), tmp_path / "failed.jsonl"
    said = together(*command, failed, failing=True)
    assert said.count("1 of 11 rows could not be scored") == 1 and not failed.exists()
    parts: list[Any] = [read(partial_path(failed, rank)) for rank in (0, 1)]
    done = [{index for _, index, _, _ in part} for part in parts]
    assert all(done) and not done[0] & done[1] and done[0] | done[1] == set(range(10))
