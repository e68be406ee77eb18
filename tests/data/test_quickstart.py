"""The built-in data: correct answers, disjoint splits, and the character tokenizer."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rpo_trainer.data import quickstart
from rpo_trainer.data.quickstart import (
    CODE,
    GENERAL,
    SPLITS,
    TEACHER_ACCURACY,
    character_tokenizer,
    split_of,
)
from rpo_trainer.data.tasks import TASKS, load_task
from rpo_trainer.errors import RecipeError
from tests.raising import raises

ROWS = 1500


@pytest.mark.parametrize("split", SPLITS)
def test_code_prompts_evaluate_to_their_ground_truth(split: str) -> None:
    for row in load_task(CODE, split, ROWS, seed=3):
        expression = row["prompt"].removesuffix(" -> ")
        assert str(eval(expression)) == row["ground_truth"]
        if split == "preference":
            assert "response" not in row
        else:
            assert row["response"] == row["ground_truth"]


def _general_answer(question: str) -> str:
    """Derive the answer from the text of the question, without the code that generates it."""
    match question.removesuffix(": ").split():
        case ["reverse", word] | [word, "backwards"]:
            return "".join(reversed(word))
        case ["sort", word] | ["put", word, "in", "order"]:
            return "".join(sorted(word))
        case [word, "in", "capitals"]:
            return word.upper()
        case ["repeat", word] | ["write", word, "twice"]:
            return word + word
        case [word, "without", "the", "first", "letter"]:
            return word[1:]
        case ["latest", "letter", "of", word]:
            return sorted(word)[-1]
        case ["add", a, "and", b] | [a, "plus", b]:
            return str(int(a) + int(b))
        case ["length", "of", word] | ["letters", "in", word]:
            return str(len(list(word)))
        case ["double", a] | ["twice", a]:
            return str(int(a) + int(a))
    raise AssertionError(f"no reading of {question!r}")


@pytest.mark.parametrize("split", SPLITS)
def test_general_ground_truth_answers_the_text(split: str) -> None:
    for row in load_task(GENERAL, split, ROWS, seed=3):
        assert _general_answer(row["prompt"]) == row["ground_truth"]


def test_the_weak_teacher_has_its_accuracy_and_plausible_errors() -> None:
    rows = load_task(GENERAL, "train", 6000, seed=0)
    wrong = [row for row in rows if row["response"] != row["ground_truth"]]
    share = 1 - len(wrong) / len(rows)
    assert share == pytest.approx(TEACHER_ACCURACY, abs=4 * (0.24 / len(rows)) ** 0.5)
    for row in wrong:
        truth, slip = row["ground_truth"], row["response"]
        assert slip
        off_by = abs(int(slip) - int(truth)) if slip.isdigit() and truth.isdigit() else None
        assert (
            sorted(slip) == sorted(truth)  # letters swapped
            or slip == truth[:-1]
            or slip in row["prompt"]  # the input
            or off_by in (1, 10)
        ), row


def test_rows_depend_on_the_seed_and_on_nothing_else() -> None:
    first = load_task(GENERAL, "train", 200, seed=1)
    assert load_task(GENERAL, "train", 200, seed=1) == first
    assert load_task(GENERAL, "train", 100, seed=1) == first[:100]
    other = load_task(GENERAL, "train", 200, seed=2)
    assert {row["prompt"] for row in other} != {row["prompt"] for row in first}
    assert not {row["id"] for row in other} & {row["id"] for row in first}


def test_rows_are_the_same_in_another_process() -> None:
    code = (
        "import json; from rpo_trainer.data.tasks import load_task;"
        "print(json.dumps(load_task('quickstart/general', 'train', 5, 7)))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root()
        ).stdout
        for _ in range(2)  # each process has another hash seed
    }
    assert len(runs) == 1


def test_data_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from rpo_trainer.data.tasks import load_task;"
        "load_task('quickstart/code', 'train', 5, 0);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_root())


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_prompt_for_any_seed(task: str) -> None:
    prompts = {
        split: {
            row["prompt"] for seed in range(3) for row in load_task(task, split, ROWS, seed=seed)
        }
        for split in SPLITS
    }
    assert not prompts["train"] & prompts["heldout"]
    assert not prompts["train"] & prompts["preference"]
    assert not prompts["preference"] & prompts["heldout"]
    assert all(split_of(prompt) == split for split in SPLITS for prompt in prompts[split])


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_distinct_short_and_of_every_kind(task: str) -> None:
    rows = load_task(task, "heldout", ROWS, seed=0)
    assert len({row["prompt"] for row in rows}) == ROWS
    assert max(len(row["prompt"]) for row in rows) <= 32
    assert max(len(row["ground_truth"]) for row in rows) <= 10
    kinds = Counter("number" if row["ground_truth"].isdigit() else "text" for row in rows)
    assert min(kinds.values()) > ROWS / 10


def test_a_size_beyond_what_there_is_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_LETTERS", "a")
    with raises("data.bad-size", RecipeError) as error:
        load_task(CODE, "heldout", 5000, 0)
    assert "5000" in error.value.what


def test_split_of_does_not_change_between_versions() -> None:
    assert [split_of(f"reverse {word}: ") for word in ("abc", "bcd", "cde", "def")] == [
        "preference",
        "heldout",
        "preference",
        "train",
    ]


def test_unknown_names_are_named_with_the_nearest_known() -> None:
    with raises("data.unknown-task", RecipeError) as error:
        load_task("quickstart/generl", "train", 1, 0)
    assert "`quickstart/general`" in error.value.what
    with raises("data.unknown-split", RecipeError) as error:
        load_task(CODE, "held-out", 1, 0)
    assert "`heldout`" in error.value.what
    with raises("data.bad-size", RecipeError) as error:
        load_task(CODE, "train", 0, 0)
    assert "`size`" in error.value.what


def test_tokenizer_is_one_token_a_character_and_loses_nothing() -> None:
    tokenizer = character_tokenizer()
    text = "".join(chr(code) for code in range(32, 127)) + "\n  a , b ."
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 100
    assert max(ids) < 100


def test_tokenizer_begins_a_text_and_marks_what_it_does_not_know() -> None:
    tokenizer = character_tokenizer()
    begin, *rest = tokenizer("aß€")["input_ids"]
    assert begin == tokenizer.bos_token_id
    assert rest[1:] == [tokenizer.unk_token_id] * 2
    special = {tokenizer.pad_token_id, begin, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(special) == 4
    assert tokenizer.decode([begin, rest[0], tokenizer.eos_token_id], skip_special_tokens=True) == (
        "a"
    )


def test_tokenizer_knows_every_character_of_the_data() -> None:
    tokenizer = character_tokenizer()
    for task in TASKS:
        for row in load_task(task, "train", 300, seed=0):
            ids = tokenizer(row["prompt"] + row["response"])["input_ids"]
            assert tokenizer.unk_token_id not in ids


def test_tokenizer_is_the_same_when_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "reverse abc: x  y\n<s>"
    for split in (True, False):
        expected = tokenizer(text, split_special_tokens=split)["input_ids"]
        assert loaded(text, split_special_tokens=split)["input_ids"] == expected
    assert loaded.decode(expected) == tokenizer.decode(expected)
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
