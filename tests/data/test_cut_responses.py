"""A truncated response trains no end token, for any template and data source."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.data import Audit, end_token_ids, set_chat_template, tokenize_rows
from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.data.sources import RawSource
from rpo_trainer.errors import DataError
from rpo_trainer.report.audits import read_audit
from rpo_trainer.rewards.pairs import make_preference_rows
from rpo_trainer.stages.record import AuditRecord
from rpo_trainer.step.reference_cache import response_key
from tests.raising import raises

from .chat_shapes import CASES, SHAPES, USER
from .test_sampled_responses import last_turn, read

STYLES = ["chatml", "plain", "characters"]
TEXTS = ["one two", "three", "four.", "five "]


@pytest.fixture
def styled(make_tokenizer: Callable[..., Any]) -> Callable[[str], tuple[Any, Any]]:
    """A tokenizer and a prompt for one kind of template."""

    def make(style: str) -> tuple[Any, Any]:
        if style == "characters":
            return character_tokenizer(), "add 1 and 2: "
        specials = ["<|im_start|>", "<|im_end|>"] if style == "chatml" else ["</s>"]
        return set_chat_template(make_tokenizer(specials, eos=specials[-1]), style), [USER]

    return make


def tokenized(rows: list[Any], tokenizer: Any, **more: Any) -> tuple[Any, Audit]:
    audit = Audit()
    options = {"max_length": 300, "truncation": "drop", "processes": 1, **more}
    return tokenize_rows(rows, tokenizer, kind="pair", audit=audit, **options), audit


def trained(example: Any, number: int) -> list[int]:
    ids, mask = example["response_ids"][number], example["response_mask"][number]
    return [token for token, of_it in zip(ids, mask, strict=True) if of_it]


@pytest.mark.parametrize("less", [1, 2])
@pytest.mark.parametrize("case", ["plain", "turns", "thought"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_sampled_tokens_and_no_more(
    shaped: Callable[[str], Any], name: str, case: str, less: int
) -> None:
    """Truncated before the end token, and before the last token of the text."""
    tokenizer, chat = shaped(name), CASES[case]
    own = last_turn(tokenizer, chat)
    sample, reader = read(tokenizer, chat[:-1], own[:-less])
    assert not sample.finished
    row = {"id": "r", "source": "s", "prompt": chat[:-1], "responses": [sample.text, "No."]}
    row |= {"rewards": None}
    (example,), _ = tokenized([{**row, "finished": [False, True]}], tokenizer)
    # Two end tokens: no text ends with only the first one. A warning reports such responses.
    assert reader.changed == (less == 1 and name in ("cohere", "always opened"))
    assert trained(example, 0) == own[: -less - reader.changed]
    assert example["response_ids"][1][-1] in end_token_ids(tokenizer)
    (whole,), _ = tokenized([row], tokenizer)  # without the column all responses are complete
    assert whole["response_ids"][0][-1] in end_token_ids(tokenizer)


@pytest.mark.parametrize("select", ["best_worst", "best_random", "all_pairs", "all_responses"])
@pytest.mark.parametrize("chosen", ["best", "ground_truth"])
@pytest.mark.parametrize("style", STYLES)
def test_every_maker_of_preference_rows_says_it(
    styled: Callable[[str], Any], style: str, chosen: Any, select: Any
) -> None:
    tokenizer, prompt = styled(style)
    flags = dict(zip(TEXTS, [True, False, False, True], strict=True))
    rows = [
        {
            "id": f"r{i}", "source": "s", "prompt": prompt, "ground_truth": TEXTS[1],
            "responses": ["", *TEXTS], "rewards": [9.0, *([1.0, 4.0, 3.0, 2.0][i:] + [0.5] * i)],
            "finished": [True, *flags.values()],
        }
        for i in range(3)
    ]  # fmt: skip
    made = make_preference_rows(rows, select=select, chosen=chosen, audit=Audit())
    assert made
    examples, audit = tokenized(made, tokenizer)
    cut = of = 0
    for row, example in zip(made, examples, strict=True):
        assert row["finished"] == [flags[text] for text in row["responses"]]
        for number, whole in enumerate(row["finished"]):
            ids = trained(example, number)
            words = ids[:-1] if whole else ids
            assert tokenizer.decode(words).strip() == row["responses"][number].strip()
            assert whole == (ids[-1] == tokenizer.eos_token_id)
            cut, of = cut + (not whole), of + 1
    assert audit.as_dict()["cut"] == {"s": {"count": cut, "of": of}}


def test_a_truncated_and_a_complete_response_with_equal_text_differ(
    styled: Callable[[str], Any],
) -> None:
    tokenizer, prompt = styled("chatml")
    row = {
        "id": "r", "source": "s", "prompt": prompt, "responses": ["a", "a", "a"], "ground_truth": "a",
        "rewards": [1.0] * 3, "finished": [False, True, False],
    }  # fmt: skip
    options: dict[str, Any] = {"select": "all_responses", "ties": "keep", "audit": Audit()}
    for chosen, flags in (("best", [False, True]), ("ground_truth", [True, False])):
        (made,) = make_preference_rows([row], chosen=chosen, **options)
        assert made["finished"] == flags
        (example,), _ = tokenized([made], tokenizer)
        keys = {
            response_key(example["prompt_ids"], ids, mask)
            for ids, mask in zip(example["response_ids"], example["response_mask"], strict=True)
        }
        assert len(keys) == 2
    # A reward model is trained on complete texts, which it will score.
    (example,), _ = tokenized([{**made, "responses": ["a", "b"]}], tokenizer, all_end=True)
    assert {ids[-1] for ids in example["response_ids"]} == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("columns", "flags"),
    [
        ({"responses": ["a", "b", "c"], "rewards": [1, 3, 2]}, [True, False, False]),
        ({"responses": ["a", "b", "c"], "ranks": [2, 0, 1]}, [True, False, False]),
        ({"chosen": "a", "rejected": "b", "chosen_reward": 2, "rejected_reward": 1}, [False, True]),
        ({"chosen": "a", "rejected": "b", "margin": 2}, [False, True]),
    ],
    ids=["responses", "ranked", "pairs", "margin"],
)
def test_the_column_is_read(columns: dict[str, Any], flags: list[bool]) -> None:
    """In the order of the responses in the file; a list of another length is an error."""

    def adapted(finished: Any) -> tuple[Any, Audit]:
        audit, row = Audit(), {"prompt": "q", "finished": finished, **columns}
        name = "margin" if "margin" in columns else None
        raw = RawSource("f", [row], [0], "f", False)
        return adapt(raw, kind="pair", format=name, audit=audit)[0], audit

    row, audit = adapted(flags)
    texts = columns.get("responses", ["a", "b"])
    assert row["finished"] == [flags[texts.index(text)] for text in row["responses"]]
    assert not audit.warnings and not audit.extra_columns
    for wrong in ([*flags, True], ["yes"] * len(flags)):
        with raises("data.wrong-type", DataError) as caught:
            adapted(wrong)
        assert "`finished`" in caught.value.what
    row, audit = adapted("2024-05-01")  # a column with another meaning
    assert "finished" not in row and audit.warnings


@pytest.mark.parametrize(("cut", "level"), [(0, None), (1, logging.INFO), (2, logging.WARNING)])
def test_truncated_responses_are_counted(
    styled: Callable[[str], Any], cut: int, level: Any
) -> None:
    """A warning, and a finding of the report, if they are more than a quarter."""
    tokenizer, prompt = styled("chatml")
    row = {"id": "r", "source": "s", "prompt": prompt, "responses": TEXTS, "rewards": None}
    _, audit = tokenized([{**row, "finished": [False] * cut + [True] * (4 - cut)}, row], tokenizer)
    assert audit.as_dict()["cut"] == {"s": {"count": cut, "of": 4}}
    lines = [found for found, text in audit.messages() if f"{cut} of 4 responses" in text]
    assert lines == ([] if level is None else [level])
    assert len(read_audit(AuditRecord.from_json(audit.as_dict())).cut) == (level == logging.WARNING)
