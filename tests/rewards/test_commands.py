"""score, generate, pairs, calibrate and audit as commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.cli.commands import main
from rpo_trainer.data import partial_file
from rpo_trainer.data.quickstart import character_tokenizer
from tests.conftest import Injected
from tests.rewards.policies import llama
from tests.rewards.server import Answer, refused, serving
from tests.rewards.test_judge import by_length
from tests.rewards.test_reward_model import save_model

PAIRS = [
    {"id": f"p{i}", "source": "mine" if i % 2 else "theirs", "prompt": f"{i} + 1 = ",
     "ground_truth": str(i + 1), "chosen": str(i + 1), "rejected": str(i), "note": "kept"}
    for i in range(6)
]  # fmt: skip
MANY = [
    {"id": f"k{i}", "prompt": f"{i} + 1 = ", "ground_truth": str(i + 1),
     "responses": [str(i), f"it is {i + 1}", str(i + 2)]}
    for i in range(6)
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


# ---------------------------------------------------------------- score


def test_pairs_keep_their_shape_their_order_and_their_columns(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run("score", write(tmp_path / "p.jsonl", PAIRS), "--verifier", "numeric", "-o", out) == 0
    scored = [{**row, "chosen_reward": 1.0, "rejected_reward": 0.0} for row in PAIRS]
    assert [{k: r[k] for k in scored[0]} for r in read(out)] == scored
    turned = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS]
    other = tmp_path / "other.jsonl"
    assert (
        run("score", write(tmp_path / "t.jsonl", turned), "--verifier", "exact", "-o", other) == 0
    )
    assert {(r["chosen_reward"], r["rejected_reward"]) for r in read(other)} == {(0.0, 1.0)}


def test_thinking_of_responses_is_written_again(tmp_path: Path) -> None:
    """Scored, read and paired, a response is still the original message."""

    def said(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": text, "reasoning_content": f"of {text}"}]

    prompt = [{"role": "user", "content": "2 + 2 = "}]
    rows = [
        {"prompt": prompt, "ground_truth": "4", "chosen": said("4"), "rejected": said("5")},
        {"prompt": prompt, "ground_truth": "4", "responses": [said("5"), said("4")]},
    ]
    for number, row in enumerate(rows):
        out, made = tmp_path / f"{number}.out.jsonl", tmp_path / f"{number}.made.jsonl"
        given = write(tmp_path / f"{number}.jsonl", [row])
        assert run("score", given, "--verifier", "exact", "-o", out) == 0
        assert run("pairs", out, "-o", made) == 0
        (pair,) = read(made)
        assert [pair["chosen"]] == said("4") and [pair["rejected"]] == said("5")


def test_k_responses_and_single_ones(tmp_path: Path) -> None:
    out = tmp_path / "k.jsonl"
    assert run("score", write(tmp_path / "i.jsonl", MANY), "--verifier", "numeric", "-o", out) == 0
    assert [row["responses"] for row in read(out)] == [row["responses"] for row in MANY]
    assert {tuple(row["rewards"]) for row in read(out)} == {(0.0, 1.0, 0.0)}
    two = [{**row, "responses": row["responses"][:2]} for row in MANY]
    out = tmp_path / "two.jsonl"
    assert run("score", write(tmp_path / "j.jsonl", two), "--verifier", "numeric", "-o", out) == 0
    assert [(r["responses"], r["rewards"]) for r in read(out)] == [
        (row["responses"], [0.0, 1.0]) for row in two
    ]
    single = [
        {"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}],
         "ground_truth": "2"}
    ]  # fmt: skip
    out = tmp_path / "s.jsonl"
    assert run("score", write(tmp_path / "m.jsonl", single), "--verifier", "exact", "-o", out) == 0
    (row,) = read(out)
    assert row["reward"] == 1.0 and row["messages"] == single[0]["messages"] and "prompt" not in row
    plain = [{"prompt": "1 + 1 = ", "response": "3", "ground_truth": "2"}]
    out = tmp_path / "r.jsonl"
    assert run("score", write(tmp_path / "q.jsonl", plain), "--verifier", "exact", "-o", out) == 0
    assert read(out)[0]["reward"] == 0.0 and read(out)[0]["response"] == "3"


def test_again_there_is_nothing_to_do_and_other_work_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "i.jsonl", MANY), tmp_path / "k.jsonl"
    command = ("score", data, "-o", out, "--verifier")
    assert run(*command, "numeric") == 0
    assert "rewards: 18 responses, mean 0.3333, from 0 to 1\n" in capsys.readouterr().out
    before = out.stat().st_mtime_ns
    assert run(*command, "numeric") == 0
    assert str(out) in capsys.readouterr().out
    assert run(*command, "exact") == 2
    assert "[output.exists]" in capsys.readouterr().err
    assert out.stat().st_mtime_ns == before
    report = json.loads((tmp_path / "k.jsonl.report.json").read_text())
    assert report["rows"] == 6 and report["settings"]["score"]["verifier"] == "numeric"
    out.write_text("{}\n")
    assert run(*command, "numeric") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "i.jsonl",
        "k.jsonl",
        "k.jsonl.report.json",
    ]


def test_killed_between_the_file_and_its_report(tmp_path: Path) -> None:
    data, out = write(tmp_path / "i.jsonl", MANY), tmp_path / "k.jsonl"
    assert run("score", data, "-o", out, "--verifier", "numeric") == 0
    report = tmp_path / "k.jsonl.report.json"
    key, whole = json.loads(report.read_text())["key"], out.read_bytes()
    report.unlink()
    done = partial_file.line(key, 0, {"rewards": [0.0, 1.0, 0.0]})
    (tmp_path / "k.jsonl.partial").write_bytes(done)
    assert run("score", data, "-o", out, "--verifier", "numeric") == 0
    assert out.read_bytes() == whole and report.exists()
    assert not (tmp_path / "k.jsonl.partial").exists()


def test_rewards_of_a_model_weighted(tmp_path: Path) -> None:
    names = {0: "good", 1: "long"}
    folder = save_model(tmp_path / "rm", num_labels=2, id2label=names)
    out = tmp_path / "o.jsonl"
    data = write(tmp_path / "p.jsonl", PAIRS)
    assert run("score", data, "--model", folder, "--weights", "good=1,long=-2", "-o", out) == 0
    for row in read(out):
        first = row["scores"][0]
        assert row["chosen_reward"] == pytest.approx(first["good"] - 2 * first["long"])


def trouble_first(good: Any, any_text: bool = False) -> Any:
    """Each request fails in one way, and then gets a good answer."""
    kinds = [
        refused(500), refused(429), Answer(hang_up=True), Answer("what?"), Answer(body=b"nonsense"),
        Answer("late", stall=1.0),
    ]  # fmt: skip

    if any_text:  # text that a scorer cannot parse is a response like any other
        kinds = [kind for kind in kinds if not kind.text]

    def answer(request: dict[str, Any], count: int) -> Answer:
        kind = kinds[hash(json.dumps(request, sort_keys=True)) % len(kinds)]
        return good(request, count) if count else kind

    return answer


def by_content(request: dict[str, Any], _: int) -> Answer:
    text = request["messages"][-1]["content"]
    # Not all at once, otherwise the requests of several threads may be answered in turn.
    return Answer(f"helpfulness:{len(text)},verbosity:{text.count('i')}.5", stall=0.05)


def test_a_reward_endpoint_in_trouble_loses_no_row(tmp_path: Path) -> None:
    data, out = write(tmp_path / "i.jsonl", MANY), tmp_path / "o.jsonl"
    weights = "helpfulness=1,verbosity=-2"
    command = ("score", data, "--name", "rm", "--weights", weights, "--timeout", 0.4, "-o")
    with serving(trouble_first(by_content)) as server:
        assert run(*command, out, "--endpoint", server.url, "--concurrency", 3) == 0
        assert 1 < server.most_at_once <= 3 + 6  # requests that stall time out; they are not ended
    rows = read(out)
    assert [row["id"] for row in rows] == [row["id"] for row in MANY]
    for row in rows:
        expected = [len(text) - 2 * (text.count("i") + 0.5) for text in row["responses"]]
        assert row["rewards"] == expected
        assert row["scores"][1] == {"helpfulness": 7.0, "verbosity": 2.5}
        assert row["answers"][1] == "helpfulness:7,verbosity:2.5"


def test_a_row_that_finally_fails_is_reported_and_tried_again_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: dict[str, Any], count: int) -> Answer:
        if bad and request["messages"][0]["content"].startswith("3 + 1"):
            return refused(400, "context too long")
        return by_content(request, count)

    data, out = write(tmp_path / "i.jsonl", MANY), tmp_path / "o.jsonl"
    bad = True
    with serving(answer) as server:
        command = (
            "score", data, "--endpoint", server.url, "--name", "rm", "-o", out, "--weights",
            "helpfulness=1,verbosity=1",
        )  # fmt: skip
        assert run(*command) == 3
        shown = capsys.readouterr().err
        assert "[rewards.rows-failed]" in shown
        assert "1 of 6 rows" in shown and "(k3)" in shown and "400 context too long" in shown
        assert not out.exists()
        bad = False
        server.asked.clear()
        assert run(*command) == 0
        assert len(server.asked) == 3
    assert len(read(out)) == 6


def test_an_endpoint_whose_answers_do_not_have_the_weighted_attributes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "i.jsonl", MANY[:1])
    with serving(by_content) as server:
        command = ("score", data, "--endpoint", server.url, "--name", "rm", "--retries", 0)
        assert run(*command, "-o", tmp_path / "o.jsonl") == 3
        shown = capsys.readouterr().err
        assert "[rewards.rows-failed]" in shown and "for helpfulness, verbosity" in shown


def test_a_judge_and_what_becomes_of_its_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "p.jsonl", PAIRS), tmp_path / "o.jsonl"

    def judge(request: dict[str, Any], count: int) -> Answer:
        turning = "3 + 1" in request["messages"][0]["content"]
        return Answer("[[A]]") if turning else by_length(request, count)

    # "9 + 1": the chosen "10" is longer; the others tie.
    rows = [*PAIRS, {**PAIRS[0], "id": "p9", "prompt": "9 + 1 = ", "chosen": "10", "rejected": "9"}]
    data = write(tmp_path / "p.jsonl", rows)
    with serving(judge) as server:
        assert run("score", data, "--judge", server.url, "--name", "j", "-o", out) == 0
    shown = capsys.readouterr().out
    assert "judge: 6 of 7 comparisons consistent, 5 equal" in shown
    assert "rewards: 12 responses, 2 without one, mean 0.5, from 0 to 1\n" in shown
    scored = read(out)
    assert (scored[3]["chosen_reward"], scored[3]["rejected_reward"]) == (None, None)
    assert (scored[-1]["chosen_reward"], scored[-1]["rejected_reward"]) == (1.0, 0.0)
    assert len(scored[0]["judge"][0]["answers"]) == 2
    assert run("pairs", out, "-o", tmp_path / "pairs.jsonl", "--ties", "keep") == 0
    shown = capsys.readouterr().out
    assert re.search(r"dropped: 1 row, .*\(p3\)", shown)
    assert len(read(tmp_path / "pairs.jsonl")) == 6


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("--verifier", "exact_match"), "option.invalid-choice", "`exact`"),
        ((), "option.not-one-scorer", "--judge"),
        (
            ("--verifier", "exact", "--model", "m"),
            "option.not-one-scorer",
            "--verifier and --model",
        ),
        (("--verifier", "exactly"), "option.invalid-choice", "--verifier"),
        (("--verifier", "asserts"), "option.invalid-value", "allow_code_execution"),
        (("--endpoint", "http://x"), "option.missing-companion", "http://x"),
        (("--verifier", "exact", "--name", "m"), "option.missing-companion", "--name"),
        (("--verifier", "exact", "--max-tokens", "5"), "option.missing-companion", "--max-tokens"),
        (("--verifier", "exact", "--weights", "a=1"), "option.invalid-value", "--weights"),
        (("--model", "m", "--weights", "a=x"), "option.not-a-number", "'x'"),
        (("--model", "m", "--weights", "a=1,b"), "option.not-an-assignment", "--weights: 'b'"),
        (("--model", "m", "--weights", "a=1,a=2"), "option.repeated-name", "--weights: 'a'"),
        (("--model", "m", "--weights", "nobodys"), "rewards.unknown-weights", "'nobodys'"),
        (("--verifier", "exact", "--column", "x"), "option.not-an-assignment", "--column: 'x'"),
        (
            ("--judge", "http://x", "--name", "m", "--retries", "-1"),
            "option.invalid-value",
            "--judge",
        ),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: tuple[str, ...], code: str, named: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = write(tmp_path / "p.jsonl", PAIRS)
    assert run("score", data, "-o", tmp_path / "o.jsonl", *arguments) == 2
    shown = capsys.readouterr().err
    assert f"[{code}]" in shown and named in shown


def test_rows_that_cannot_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = [{k: v for k, v in row.items() if k != "ground_truth"} for row in PAIRS]
    data = write(tmp_path / "p.jsonl", bare)
    assert run("score", data, "--verifier", "exact", "-o", tmp_path / "o.jsonl") == 3
    shown = capsys.readouterr().err
    assert (
        "[verifier.missing-ground-truth]" in shown
        and "verifier 'exact'" in shown
        and "6 of 6 rows" in shown
    )


# ---------------------------------------------------------------- generate

PROMPTS = [{"id": f"q{i}", "prompt": f"reverse {'abcdef'[: i + 1]}: ", "ground_truth": "x", "level": i}
           for i in range(6)]  # fmt: skip


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("policies")
    for seed in (0, 1):
        llama(seed, vocab_size=len(character_tokenizer())).save_pretrained(folder / str(seed))
        character_tokenizer().save_pretrained(folder / str(seed))
    return [folder / "0", folder / "1"]


def test_responses_of_several_policies(tmp_path: Path, policies: list[Path]) -> None:
    data, out = write(tmp_path / "p.jsonl", PROMPTS), tmp_path / "o.jsonl"
    command = ("generate", data, "--policy", policies[0], "--max-new-tokens", 6, "--responses", 2)
    assert run(*command, "--policy", policies[1], "-o", out, "--seed", 4, "--batch-size", 5) == 0
    rows = read(out)
    assert [row["id"] for row in rows] == [row["id"] for row in PROMPTS]
    assert all(len(row["responses"]) == len(row["finished"]) == 4 for row in rows)
    assert rows[0]["policies"] == [str(policies[0])] * 2 + [str(policies[1])] * 2
    assert rows[0]["sampling"] == {
        "responses": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6, "seed": 4,
    }  # fmt: skip
    assert rows[2]["level"] == 2 and rows[2]["ground_truth"] == "x"
    # A policy's responses do not depend on other policies or rows.
    alone, few = tmp_path / "alone.jsonl", tmp_path / "few.jsonl"
    assert run(*command, "-o", alone, "--seed", 4) == 0
    assert [r["responses"] for r in read(alone)] == [row["responses"][:2] for row in rows]
    part = write(tmp_path / "part.jsonl", PROMPTS[2:4])
    assert run("generate", part, *command[2:], "-o", few, "--seed", 4) == 0
    assert [r["responses"] for r in read(few)] != [r["responses"] for r in read(alone)][2:4]


def test_the_ground_truth_next_to_what_is_sampled(
    tmp_path: Path, policies: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "ground_truth": f"truth {i}"} for i, row in enumerate(PROMPTS)]
    rows[3] = {"id": "q3", "prompt": "none: "}
    data, out, plain = write(tmp_path / "p.jsonl", rows), tmp_path / "o.jsonl", tmp_path / "n.jsonl"
    command = ("generate", data, "--policy", policies[0], "--max-new-tokens", 6, "--responses", 2)
    assert run(*command, "-o", plain) == 0
    assert run(*command, "--with-ground-truth", "-o", out) == 0
    for i, (found, sampled) in enumerate(zip(read(out), read(plain), strict=True)):
        more = [] if i == 3 else [f"truth {i}"]
        assert found["responses"] == sampled["responses"] + more
        assert found["finished"] == sampled["finished"] + [True for _ in more]
        assert found["policies"] == sampled["policies"] + ["ground_truth" for _ in more]
        assert found["sampling"]["with_ground_truth"]
    # It is then chosen, with its assigned reward.
    scored, pairs = tmp_path / "s.jsonl", tmp_path / "pairs.jsonl"
    few = write(tmp_path / "few.jsonl", [row for row in read(out) if row["id"] != "q3"])
    assert run("score", few, "--verifier", "partial_match", "-o", scored) == 0
    assert run("pairs", scored, "--chosen", "ground_truth", "-o", pairs) == 0
    made = [(row["chosen"], row["chosen_reward"], row["truth_chosen"]) for row in read(pairs)]
    assert made == [(f"truth {i}", 5.0, True) for i in range(6) if i != 3]
    capsys.readouterr()
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "a"}])
    assert run("generate", bare, *command[2:], "--with-ground-truth", "-o", tmp_path / "x") == 3
    assert "[data.missing-ground-truth]" in capsys.readouterr().err


def test_rows_of_one_source_name_sample_alike_next_to_other_rows(
    tmp_path: Path, policies: list[Path]
) -> None:
    rows = [{**row, "source": "s"} for row in PROMPTS]
    settings = ("--policy", policies[0], "--max-new-tokens", 6, "--seed", 4)
    whole, few = tmp_path / "whole.jsonl", tmp_path / "few.jsonl"
    assert run("generate", write(tmp_path / "a.jsonl", rows), *settings, "-o", whole) == 0
    assert run("generate", write(tmp_path / "b.jsonl", rows[3:5]), *settings, "-o", few) == 0
    assert read(few) == read(whole)[3:5]


def test_responses_of_an_endpoint_in_trouble(tmp_path: Path) -> None:
    def good(request: dict[str, Any], _: int) -> Answer:
        cut = request["max_tokens"] < 5
        return Answer(f"{request['seed']}", finish_reason="length" if cut else "stop")

    data, out = write(tmp_path / "p.jsonl", PROMPTS), tmp_path / "o.jsonl"
    with serving(trouble_first(good, any_text=True)) as server:
        command = (
            "generate", data, "--endpoint", server.url, "--name", "m", "--timeout", 0.4,
            "--max-new-tokens", 4, "--temperature", 0.7, "--top-p", 0.9, "--top-k", 5,
        )  # fmt: skip
        assert run(*command, "-o", out) == 0
        assert run(*command, "-o", tmp_path / "again.jsonl") == 0
        request = server.asked[0]
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 4, "model": "m"}
    assert {k: request[k] for k in sampling} == sampling
    rows = read(out)
    texts = [text for row in rows for text in row["responses"]]
    assert len({*texts}) == 24  # each request has its own seed
    assert rows[0]["policies"] == ["m"] * 4
    assert not any(flag for row in rows for flag in row["finished"])


def test_chat_prompts_go_to_the_chat_endpoint(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}]
    with serving(lambda *_: Answer("yo")) as server:
        command = (
            "generate",
            write(tmp_path / "p.jsonl", rows),
            "--endpoint",
            server.url,
            "--name",
            "m",
        )
        assert (
            run(*command, "--max-new-tokens", 4, "--responses", 1, "-o", tmp_path / "o.jsonl") == 0
        )
    assert server.asked[0]["messages"] == rows[0]["prompt"]
    assert read(tmp_path / "o.jsonl")[0]["responses"] == ["yo"]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ((), "[option.missing-policy]", "--policy"),
        (("--endpoint", "http://x"), "[option.missing-companion]", "--name"),
        (("--policy", "/nowhere/at/all"), "[model.not-found]", "/nowhere/at/all"),
        (("--policy", "POLICY", "--temperature", "0"), "[option.invalid-value]", "--temperature"),
    ],
)
def test_generate_refusals(
    arguments: tuple[str, ...], code: str, named: str, tmp_path: Path, policies: list[Path],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = write(tmp_path / "p.jsonl", PROMPTS)
    given = [str(policies[0]) if a == "POLICY" else a for a in arguments]
    assert run("generate", data, "--max-new-tokens", 4, "-o", tmp_path / "o.jsonl", *given) == 2
    shown = capsys.readouterr().err
    assert code in shown and named in shown


def test_rows_that_have_responses_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policies: list[Path]
) -> None:
    data = write(tmp_path / "p.jsonl", MANY)
    command = ("generate", data, "--policy", policies[0], "--max-new-tokens", 4)
    assert run(*command, "-o", tmp_path / "o.jsonl") == 3
    assert "[data.has-responses]" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_killed_at_any_moment_and_started_again(
    tmp_path: Path, policies: list[Path], injected: Injected
) -> None:
    rows = [{"id": str(i), "prompt": f"say {i}: "} for i in range(40)]
    data = write(tmp_path / "p.jsonl", rows)
    command = [
        sys.executable, "-m", "rpo_trainer", "generate", data, "--policy", str(policies[0]),
        "--policy", str(policies[1]), "--max-new-tokens", "20", "--batch-size", "8",
    ]  # fmt: skip
    kills = assert_killed_is_whole(command, tmp_path)
    injected(f"SIGKILL of generate, {kills} times", "survived")


@pytest.mark.slow
def test_score_killed_at_any_moment_and_started_again(tmp_path: Path, injected: Injected) -> None:
    rows = [
        {
            "id": str(i),
            "prompt": f"say {i}: ",
            "responses": [f"{i}", f"it is {i}", "x" * (i % 9 + 1)],
        }
        for i in range(300)
    ]
    command = [
        sys.executable, "-m", "rpo_trainer", "score", write(tmp_path / "s.jsonl", rows),
        "--model", str(save_model(tmp_path / "rm")), "--batch-tokens", "60",
    ]  # fmt: skip
    kills = assert_killed_is_whole(command, tmp_path)
    injected(f"SIGKILL of score, {kills} times", "survived")


def assert_killed_is_whole(command: list[str], folder: Path) -> int:
    """A command that is killed and started again until it is done writes what it would have written.

    Returns:
        How often it was killed.
    """
    whole, out = folder / "whole.jsonl", folder / "out.jsonl"
    subprocess.run([*command, "-o", str(whole)], check=True)
    kills, part_file = 0, folder / "out.jsonl.partial"
    part = whole.stat().st_size // 8  # each start takes seconds
    for _ in range(20):
        process = subprocess.Popen([*command, "-o", str(out)])
        before = part_file.stat().st_size if part_file.exists() else 0
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if part_file.exists() and part_file.stat().st_size > before + part:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
        if out.exists() and process.returncode == 0:
            break
    assert kills >= 2
    assert out.read_bytes() == whole.read_bytes()
    return kills


# ---------------------------------------------------------------- pairs, calibrate, audit


def scored(tmp_path: Path) -> str:
    rows = [
        {"id": f"k{i}", "prompt": f"p{i}", "responses": ["a", "b", "c"], "rewards": [i, i + 1, i + 3]}
        for i in range(8)
    ]  # fmt: skip
    return write(tmp_path / "scored.jsonl", rows)


def test_pairs_of_scored_responses_with_a_filter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.jsonl"
    assert run("pairs", scored(tmp_path), "-o", out, "--keep-top-fraction", 0.25) == 0
    shown = capsys.readouterr().out
    assert "filter: 2 of 8 rows pass (chosen reward at least 9)" in shown
    assert "reward gaps: 2 rows, mean 3, from 3 to 3\n" in shown
    assert [(r["chosen"], r["rejected"], r["chosen_reward"], r["rejected_reward"]) for r in read(out)] == [
        ("c", "a", 9.0, 6.0), ("c", "a", 10.0, 7.0),
    ]  # fmt: skip
    assert run("pairs", scored(tmp_path), "-o", out) == 2
    assert "[output.exists]" in capsys.readouterr().err
    whole = tmp_path / "k.jsonl"
    assert run("pairs", scored(tmp_path), "-o", whole, "--select", "all_responses") == 0
    assert read(whole)[0]["rewards"] == [3.0, 1.0, 0.0]


def test_pairs_of_ranked_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "p", "responses": ["bad", "good", "fair"], "ranks": [2, 0, 1]}]
    out = tmp_path / "o.jsonl"
    assert run("pairs", write(tmp_path / "r.jsonl", rows), "-o", out, "--select", "all_pairs") == 0
    assert [(r["chosen"], r["rejected"]) for r in read(out)] == [
        ("good", "fair"), ("good", "bad"), ("fair", "bad"),
    ]  # fmt: skip
    assert "chosen_reward" not in read(out)[0]
    assert "reward gaps" not in capsys.readouterr().out


def test_sampled_responses_are_not_taken_for_ranked_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "responses": ["a", "b"], "sampling": {"responses": 2}}]
    command = ("pairs", write(tmp_path / "r.jsonl", rows), "-o", tmp_path / "o.jsonl")
    assert run(*command) == 3
    assert "rpo-trainer score" in capsys.readouterr().err
    assert run(*command, "--format", "ranked") == 0


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "named"),
    [
        (("--select", "best"), 2, "[option.invalid-choice]", "--select"),
        (("--select", "bestworst"), 2, "[option.invalid-choice]", "`best_worst`"),
        (("--min-chosen-reward", "1", "--keep-top-fraction", "0.5"), 2, "[option.invalid-value]",
         "--keep-top-fraction"),
        (("--min-gap", "50"), 3, "[data.no-rows-left]", "8 rows"),
        (("--min-chosen-reward", "50"), 3, "[data.no-rows-left]", "filter"),
    ],
)  # fmt: skip
def test_pairs_refusals(
    arguments: tuple[str, ...], exit_code: int, code: str, named: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run("pairs", scored(tmp_path), "-o", tmp_path / "o.jsonl", *arguments) == exit_code
    shown = capsys.readouterr().err
    assert code in shown and named in shown


def test_calibrate_shows_and_prints_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(
        tmp_path / "p.jsonl",
        [{**p, "chosen_reward": 5.0 + i, "rejected_reward": 2.0} for i, p in enumerate(PAIRS)]
        + [{**PAIRS[0], "id": "bare"}],
    )
    assert run("calibrate", data, "--reward-scale", "100") == 0
    shown = capsys.readouterr().out
    assert "warning: 1 without rewards" in shown
    assert "all: 6 pairs, 0 ties, 0 reversed" in shown
    assert "mine: 3 pairs" in shown and "theirs: 3 pairs" in shown
    assert "warning: 100%" in shown
    assert run("calibrate", data, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["all"]["fit"]["method"] == "quantile"
    assert found["all"]["reward_scale"] == found["all"]["fit"]["reward_scale"]
    assert run("calibrate", data, "--reward-scale", "0") == 2
    assert run("calibrate", data, "--reward-scale", "inf") == 2
    assert run("calibrate", write(tmp_path / "bare.jsonl", PAIRS)) == 3
    assert "[data.missing-rewards]" in capsys.readouterr().err


def test_audit_shows_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "p.jsonl", [*PAIRS, {**PAIRS[0], "id": "again"}])
    held_out = write(tmp_path / "h.jsonl", PAIRS[:2])
    assert run("audit", data, "--against", held_out) == 0
    shown = capsys.readouterr().out
    assert "p.jsonl: preference rows" in shown
    assert re.search(r"\b1 row.*again", shown)
    assert "2 of 2 eval rows" in shown
    assert run("audit", data, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "pair"
    assert run("audit", data, "--max-length", "10") == 2
    shown = capsys.readouterr().err
    assert "[option.missing-companion]" in shown and "--tokenizer" in shown


TALKS = [{"prompt": [{"role": "user", "content": c}], "ground_truth": c} for c in "ab"]
WITH_MODE = (
    "{{ mode }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def test_generate_with_variables_of_the_template(
    tmp_path: Path, policies: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jinja").write_text(WITH_MODE)
    rows = [TALKS[0], {**TALKS[1], "chat_template_kwargs": {"mode": "row"}}]
    command = (
        "generate", write(tmp_path / "p.jsonl", rows), "--policy", policies[0],
        "--chat-template", tmp_path / "t.jinja", "--max-new-tokens", 4,
    )  # fmt: skip
    found = {}
    for mode in ("a", "b"):
        out = tmp_path / f"{mode}.jsonl"
        assert run(*command, "-o", out, "--kwargs", f"mode={mode}") == 0
        found[mode] = read(out)
        given = [row["chat_template_kwargs"] for row in found[mode]]
        assert given == [{"mode": mode}, {"mode": "row"}]  # read again with the responses
    first, second = found["a"], found["b"]
    assert first[0]["responses"] != second[0]["responses"]
    assert first[1] == second[1]
    # Another mode is different work, not a finished file.
    assert run(*command, "-o", tmp_path / "a.jsonl", "--kwargs", "mode=b") == 2
    assert run(*command, "-o", tmp_path / "c.jsonl", "--kwargs", "depth=1") == 2
    assert "`depth`" in capsys.readouterr().err


def test_score_with_variables_of_a_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "p.jsonl", [{**TALKS[0], "responses": ["x", "yy"]}])
    assert run("score", data, "-o", tmp_path / "o", "--verifier", "exact", "--kwargs", "a=1") == 2
    assert "--kwargs" in capsys.readouterr().err
    for by, wanted in (("--endpoint", "reward:1"), ("--judge", "[[A]]")):
        with serving(lambda *_, wanted=wanted: Answer(wanted)) as server:
            out = tmp_path / f"{by}.jsonl"
            assert (
                run("score", data, by, server.url, "--name", "m", "--kwargs", "a=1", "-o", out) == 0
            )
        assert {json.dumps(r["chat_template_kwargs"]) for r in server.asked} == {'{"a": 1}'}
        assert ("chat_template_kwargs" in read(out)[0]) == (by == "--endpoint")
