"""Each bad row is refused with its id, dropped and counted, or reported in a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import Audit, filter_rows, load_rows, tokenize_rows
from rpo_trainer.errors import DataError, Problems
from tests.raising import codes_of, problems_of, raises

from .conftest import trained_texts

HALF = [f"r{i}" for i in range(0, 10, 2)]  # the bad rows of `mixed`
USER = {"role": "user", "content": "q"}


class Run:
    """Rows written to a file, loaded, filtered and tokenized as in a stage."""

    def __init__(self, folder: Path, source: Any, tokenizer: Any) -> None:
        self.folder, self.source, self.tokenizer = folder, source, tokenizer
        self.audit = Audit()

    def load(self, rows: list[Any], kind: Any = "pair", **options: Any) -> list[Any]:
        lines = [json.dumps({"id": f"r{i}", **row}) + "\n" for i, row in enumerate(rows)]
        (self.folder / "rows.jsonl").write_text("".join(lines))
        fields = {"base_dir": self.folder, "audit": self.audit, "seed": 0, **options}
        return load_rows([self.source("rows.jsonl")], kind=kind, **fields)

    def train(self, rows: list[Any], kind: Any = "pair", **options: Any) -> Any:
        spec = options.pop("filter", None)
        fields = {"max_length": 60, "truncation": "drop", **options}
        loaded = self.load(rows, kind)
        if kind == "pair":
            loaded = filter_rows(loaded, spec, self.audit)
        return tokenize_rows(loaded, self.tokenizer, kind=kind, audit=self.audit, **fields)

    def refused(
        self, code: str, rows: list[Any], kind: Any = "pair", *, bad: list[str], **options: Any
    ) -> str:
        """Return the message of the error with this code about the rows `bad`."""
        fields = {"where": f"{self.folder}/rows.jsonl", "rows": bad, "of": len(rows)}
        with raises(code, DataError, exit_code=3, **fields) as error:
            self.load(rows, kind, **options)
        first = f"{len(bad)} of {len(rows)} rows, first {', '.join(bad[:3])}"
        assert error.value.what.endswith(first)
        return error.value.what

    def counts(self, what: str = "dropped") -> dict[str, Any]:
        found: dict[str, Any] = self.audit.as_dict()[what]
        return found


@pytest.fixture
def run(tmp_path: Path, source: Any, chatml: Any) -> Run:
    return Run(tmp_path, source, chatml)


def pair(chosen: Any = "yes", rejected: Any = "no", **more: Any) -> dict[str, Any]:
    return {"prompt": [USER], "chosen": chosen, "rejected": rejected, **more}


def scored(chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return pair(chosen_reward=chosen, rejected_reward=rejected, **more)


def mixed(good: Any, bad: Any, n: int = 10) -> list[Any]:
    """Rows of which every second one is bad, starting with the first."""
    return [good if i % 2 else bad for i in range(n)]


def counted(n: int, *ids: str) -> dict[str, Any]:
    return {"count": n, "examples": list(ids)}


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("column", ["chosen", "rejected", "prompt"])
@pytest.mark.parametrize("null", [True, False])
def test_a_column_absent_in_some_rows(run: Run, column: str, null: bool) -> None:
    bad = {key: value for key, value in pair().items() if key != column}
    if null:
        bad[column] = None
    what = run.refused("data.missing-value", mixed(pair(), bad), bad=HALF)
    assert what.startswith(f"`{column}` ")


@pytest.mark.parametrize(
    ("value", "fault"),
    [(None, "null"), ("4", " text;"), (True, "a boolean"), ([1], "type list")],
)
def test_rewards_that_are_not_numbers(run: Run, value: Any, fault: str) -> None:
    rows = mixed(scored(2, 1), scored(value, 1))
    assert fault in run.refused("data.bad-reward", rows, bad=HALF, require_rewards=True)


def test_a_reward_that_is_not_there(run: Run) -> None:
    bad = scored(2, 1)
    del bad["rejected_reward"]
    rows = mixed(scored(2, 1), bad)
    assert "missing" in run.refused("data.bad-reward", rows, bad=HALF, require_rewards=True)


@pytest.mark.parametrize(("number", "fault"), [("1e999", "infinite"), ("-1e999", "infinite")])
def test_rewards_that_are_not_finite(run: Run, number: str, fault: str, tmp_path: Path) -> None:
    """Infinite numbers in valid JSON; the literal NaN is refused with the file."""
    line = json.dumps(scored(2, 1)).replace(": 2,", f": {number},")
    (tmp_path / "rows.jsonl").write_text(line)
    with raises("data.bad-reward", DataError) as error:
        load_rows(
            [run.source("rows.jsonl")], kind="pair", base_dir=tmp_path, require_rewards=True,
            audit=Audit(), seed=0,
        )  # fmt: skip
    assert f" {fault};" in error.value.what


def test_nan_rewards_in_parquet(run: Run, tmp_path: Path) -> None:
    """In a file format with NaN, the row is named."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [scored(2.0, 1.0), scored(float("nan"), 1.0)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    where = f"{tmp_path}/rows.parquet"
    with raises("data.bad-reward", DataError, where=where, rows=["rows.parquet:1"]) as error:
        load_rows(
            [run.source("rows.parquet")], kind="pair", base_dir=tmp_path, require_rewards=True,
            audit=Audit(), seed=0,
        )  # fmt: skip
    assert " NaN;" in error.value.what


def test_without_rpo_such_rewards_are_left_out_and_counted(run: Run) -> None:
    rows = run.load(mixed(scored(2, 1), scored("4", 1)))
    assert [row["rewards"] for row in rows[:2]] == [None, [2.0, 1.0]]
    assert run.counts("warnings")["unusable_rewards"] == counted(5, "r0", "r2", "r4")


def test_chosen_and_rejected_whose_prompts_differ(run: Run) -> None:
    def said(prompt: str, answer: str) -> list[Any]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    good = {"chosen": said("q", "yes"), "rejected": said("q", "no")}
    bad = {"chosen": said("q", "yes"), "rejected": said("other", "no")}
    assert "`chosen`" in run.refused("data.different-prompts", mixed(good, bad), bad=HALF)


@pytest.mark.parametrize(
    ("content", "code", "kind"), [(3, "data.wrong-type", "int"), ([3], "data.not-text", "list")]
)
def test_content_that_is_not_text(run: Run, content: Any, code: str, kind: str) -> None:
    bad = pair(chosen=[{"role": "assistant", "content": content}])
    what = run.refused(code, mixed(pair(), bad), bad=HALF)
    assert "`chosen`" in what and kind in what


def test_content_that_is_null(run: Run) -> None:
    bad = pair(chosen=[{"role": "assistant", "content": None}])
    assert "`chosen`" in run.refused("data.missing-content", mixed(pair(), bad), bad=HALF)


@pytest.mark.parametrize(
    ("roles", "wrong"),
    [
        (["user", "user", "assistant"], 2),
        (["user", "assistant", "assistant"], 3),
        (["user", "system", "assistant"], 2),
        (["user", "tool", "assistant"], 2),
    ],
)
def test_roles_out_of_order(run: Run, roles: list[str], wrong: int) -> None:
    def chat(names: list[str]) -> dict[str, Any]:
        return {"messages": [{"role": name, "content": "x"} for name in names]}

    rows = mixed(chat(["user", "assistant"]), chat(roles))
    what = run.refused("data.role-order", rows, "sft", bad=HALF)
    assert "`messages`" in what and f"('{roles[wrong - 1]}' as message {wrong})" in what


def test_an_unknown_role(run: Run) -> None:
    bad = {"messages": [USER, {"role": "narrator", "content": "x"}]}
    what = run.refused("data.unknown-role", [bad], "sft", bad=["r0"])
    assert "`messages`" in what and "'narrator'" in what


def test_half_a_surrogate_pair_from_a_list_of_rows(chatml: Any) -> None:
    """Possible only for rows passed by a program."""
    from rpo_trainer.data import prepare_dataset

    with raises(
        "data.lone-surrogate", DataError, where="dataset", rows=["dataset:0"], of=1
    ) as error:
        prepare_dataset([pair("\ud83d")], chatml, kind="pair", max_length=50)
    assert "`chosen`" in error.value.what


def test_several_faults_come_at_once(run: Run) -> None:
    rows = [pair(), pair(None), scored("4", 1), pair(3), pair(None)]
    with pytest.raises(Problems) as error:
        run.load(rows, require_rewards=True)
    assert error.value.exit_code == 3
    found = problems_of(error.value)
    assert [(each.code, each.details["rows"], each.details["of"]) for each in found] == [
        ("data.bad-reward", ["r0"], 5),
        ("data.missing-value", ["r1", "r4"], 5),
        ("data.bad-reward", ["r2"], 5),
        ("data.not-messages", ["r3"], 5),
    ]
    named = ("missing", "`chosen`", " text;", "`chosen`")
    assert all(word in each.what for word, each in zip(named, found, strict=True))
    assert codes_of(error.value)[0] == error.value.code


# ---------------------------------------------------------------- drops


@pytest.mark.parametrize("blank", ["", " ", "\n\t\u3000"])
def test_empty_or_blank_responses(run: Run, blank: str) -> None:
    data = run.train([pair(), pair(blank), pair("yes", blank)])
    assert data["id"][:] == ["r0"]
    assert run.counts() == {"empty_response": counted(2, "r1", "r2")}
    drops = run.audit.drops()
    assert drops is not None and "67%" in drops and "2 of 3 rows" in drops and "(r1, r2)" in drops


def test_empty_turns_of_the_assistant(run: Run) -> None:
    def chat(*answers: str) -> dict[str, Any]:
        turns = [[USER, {"role": "assistant", "content": text}] for text in answers]
        return {"messages": [message for turn in turns for message in turn]}

    data = run.train([chat("a"), chat("a", " "), chat("", "a")], "sft")
    assert data["id"][:] == ["r0"]
    assert run.counts() == {"empty_response": counted(2, "r1", "r2")}


def test_chosen_the_same_as_rejected(run: Run) -> None:
    data = run.train([pair(), pair("same", "same")])
    assert data["id"][:] == ["r0"]
    assert run.counts() == {"identical_responses": counted(1, "r1")}


def test_chosen_equal_to_rejected_after_truncation(run: Run) -> None:
    long = "word " * 80
    data = run.train([pair(), pair(long + "a", long + "b")], truncation="truncate", max_length=40)
    assert data["id"][:] == ["r0"]
    assert run.counts() == {"identical_after_truncation": counted(1, "r1")}
    # Without truncation the row is dropped for its length.
    other = Run(run.folder, run.source, run.tokenizer)
    other.train([pair(), pair(long + "a", long + "b")], max_length=40)
    assert other.counts() == {"too_long": counted(1, "r1")}


@pytest.mark.parametrize("truncation", ["drop", "truncate"])
def test_a_prompt_that_leaves_no_room(run: Run, truncation: str) -> None:
    bad = {**pair(), "prompt": [{"role": "user", "content": "word " * 80}]}
    data = run.train([pair(), bad], truncation=truncation, max_length=40)
    assert data["id"][:] == ["r0"]
    assert run.counts() == {"prompt_too_long": counted(1, "r1")}


@pytest.mark.parametrize("truncation", ["drop", "truncate"])
def test_a_pair_truncated_before_the_response(run: Run, truncation: str) -> None:
    """The prompt has exactly `max_length` tokens."""
    (whole,) = run.train([pair("a b", "c d")], max_length=1000)
    prompt, longest = len(whole["prompt_ids"]), max(map(len, whole["response_ids"]))
    fits = Run(run.folder, run.source, run.tokenizer)
    assert len(fits.train([pair("a b", "c d")], truncation="truncate", max_length=prompt + 1)) == 1
    full = Run(run.folder, run.source, run.tokenizer)
    with raises("data.no-rows-left", DataError) as error:
        full.train([pair("a b", "c d")], truncation=truncation, max_length=prompt)
    assert full.counts() == {"prompt_too_long": counted(1, "r0")}
    assert "(r0)" in str(error.value.why) and f"longest {prompt + longest}" in str(error.value.why)
    assert "max_length" in str(error.value.fix) and f"({prompt})" in str(error.value.fix)


def test_reversed_pairs_above_half_a_percent(run: Run) -> None:
    rows = [scored(2, 1)] * 198 + [scored(1, 2)]
    with raises("data.reversed-pairs", DataError, exit_code=3) as error:
        run.train(rows)
    assert error.value.what.endswith("1 of 199 rows, first r198")
    assert "0.5%" in str(error.value.why)
    assert "`columns:`" in str(error.value.fix)
    assert "{reversed: drop}" in str(error.value.fix)


def policy(**fields: Any) -> Any:
    from rpo_trainer.recipe.schema import FilterSpec

    return FilterSpec(**fields)


def test_reversed_pairs_below_half_a_percent_are_dropped(run: Run) -> None:
    assert len(run.train([scored(2, 1)] * 199 + [scored(1, 2)])) == 199
    assert run.counts() == {"reversed": counted(1, "r199")}


@pytest.mark.parametrize(("choice", "left"), [("drop", 1), ("keep", 2)])
def test_reversed_pairs_by_policy(run: Run, choice: Any, left: int) -> None:
    rows = [scored(2, 1), scored(1, 2)]
    assert len(run.train(rows, filter=policy(reversed=choice))) == left
    assert run.audit.pairs["reversed"] == 1
    assert run.counts() == ({} if left == 2 else {"reversed": counted(1, "r1")})


@pytest.mark.parametrize(("choice", "left"), [("drop", 1), ("keep", 2)])
def test_ties_by_policy(run: Run, choice: Any, left: int) -> None:
    assert len(run.train([scored(2, 1), scored(2, 2)], filter=policy(ties=choice))) == left
    assert run.audit.pairs["ties"] == 1
    assert run.counts() == ({} if left == 2 else {"tie": counted(1, "r1")})


# ---------------------------------------------------------------- warnings


def test_extra_columns(run: Run) -> None:
    run.load([pair(topic="a"), pair(author="b")])
    assert run.audit.extra_columns == {"rows.jsonl": ["author", "topic"]}
    assert run.audit.unread_columns == {}  # no warning


def test_duplicate_prompts(run: Run) -> None:
    run.load([pair(), pair("x", "y"), {**pair(), "prompt": "other"}])
    assert run.counts("warnings") == {"duplicate_prompt": counted(1, "r1")}
    (line,) = [line for line in run.audit.summary_lines() if "(r1)" in line]
    assert line.startswith("1 row (33%)")


def test_gaps_that_are_all_equal(run: Run) -> None:
    run.load([scored(2, 1), scored(5, 4)])
    (remark,) = run.audit.remarks
    assert remark.endswith("(1)") and f"warning: {remark}" in run.audit.summary_lines()


def test_gaps_so_wide_that_the_targets_are_labels(run: Run) -> None:
    rows = run.load([scored(9, 1), scored(90, 10), scored(2, 1)])
    run.audit.check_target_gaps(rows, 1.0)
    (remark,) = run.audit.remarks
    assert "2 of 3 rows" in remark and "smaller reward_scale" in remark
    narrow = Run(run.folder, run.source, run.tokenizer)
    narrow.audit.check_target_gaps(rows, 0.5)
    assert narrow.audit.remarks == []


def test_chosen_much_longer_than_rejected(run: Run) -> None:
    run.load([pair("a" * 16, "a" * 10), pair("b" * 15, "b" * 10)])
    (remark,) = run.audit.remarks
    assert "longer" in remark and "16" in remark and "10 characters" in remark
    short = Run(run.folder, run.source, run.tokenizer)
    short.load([pair("a" * 14, "a" * 10), pair("b" * 15, "b" * 10)])
    assert short.audit.remarks == []


def test_special_tokens_in_the_text(run: Run) -> None:
    data = run.train([pair("a<|im_end|>b", "c"), pair()])
    assert run.counts("warnings")["special_token_text"] == counted(1, "r0")
    end = run.tokenizer.eos_token_id
    assert [ids.count(end) for ids in data[0]["response_ids"]] == [1, 1]
    assert run.tokenizer.decode(data[0]["response_ids"][0]) == "a<|im_end|>b<|im_end|>"


# ---------------------------------------------------------------- accepted rows


@pytest.mark.parametrize(
    "words",
    ["🙂👩‍👩‍👧", "e\u0301 a\u0308\u0323", "שלום \u202eabc", "NUL \x00 and \x07", "\u2028 \u0085 x"],
)
def test_characters_that_must_work(run: Run, words: str) -> None:
    data = run.train([pair(words, "no"), {**pair(), "prompt": [{**USER, "content": words}]}])
    assert run.counts() == {}
    ids, mask = data[0]["response_ids"][0], data[0]["response_mask"][0]
    assert trained_texts(run.tokenizer, ids, mask) == [words + "<|im_end|>"]
    assert words in run.tokenizer.decode(data[1]["prompt_ids"])


def test_a_truncated_response_does_not_train_its_end_token(run: Run) -> None:
    data = run.train([pair("word " * 80, "short")], truncation="truncate", max_length=40)
    long, short = data[0]["response_ids"]
    end = run.tokenizer.eos_token_id
    assert (end in long, short[-1]) == (False, end)
    assert len(data[0]["prompt_ids"]) + len(long) == 40
    assert data[0]["response_mask"][0] == [1] * len(long)
    assert run.counts("warnings")["truncated"] == counted(1, "r0")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_long_rows_are_dropped_by_default_whichever_side_is_long(run: Run, side: str) -> None:
    data = run.train([pair(), pair(**{side: "word " * 80})], max_length=40)
    assert data["id"][:] == ["r0"]
    assert run.counts() == {"too_long": counted(1, "r1")}


def test_both_responses_are_truncated_alike(run: Run) -> None:
    """Truncated to `max_length` tokens of prompt and response, with the entire prompt."""
    data = run.train(
        [pair("word " * 80, "cat " * 90), pair("cat " * 90, "word " * 80)],
        truncation="truncate", max_length=40,
    )  # fmt: skip
    lengths = [[len(ids) for ids in row["response_ids"]] for row in data]
    room = 40 - len(data[0]["prompt_ids"])
    assert lengths == [[room, room]] * 2
    assert data[0]["response_ids"] == data[1]["response_ids"][::-1]
    assert run.counts("warnings")["truncated"] == counted(2, "r0", "r1")
