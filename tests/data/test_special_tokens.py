"""Special-token text in the data is read as text or as tokens, or an error requires a setting."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import Audit, encode_prompt, load_rows, prepare_dataset, tokenize_rows
from rpo_trainer.errors import DataError
from tests.raising import raises

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
MARKED = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=["<|im_end|>", "</s>"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Any]) -> Any:
    """A tokenizer that prepends BOS; the template's end marker is the EOS token or another token."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    return make_tokenizer(
        specials, bos="<s>", eos=request.param, adds_begin=True, chat_template=TEMPLATE
    )


def prepared(rows: list[Any], tokenizer: Any, kind: Any, **options: Any) -> list[Any]:
    audit = options.pop("audit", Audit())
    return list(prepare_dataset(rows, tokenizer, kind=kind, max_length=500, audit=audit, **options))


def test_parsed_rows_are_those_of_the_messages(tokenizer: Any) -> None:
    """Prompt and response that were rendered before have the same tokens as the messages."""
    (wanted,) = prepared([{"messages": TALK}], tokenizer, "sft")
    whole = wanted["prompt_ids"] + wanted["response_ids"][0]
    for end in ("<|im_end|>", "<|im_end|>\n"):
        row = {"prompt": MARKED, "response": f"Yes.{end}"}
        (found,) = prepared([row], tokenizer, "sft", special_tokens="parse")
        assert found["prompt_ids"] == wanted["prompt_ids"]
        assert found["response_ids"] == wanted["response_ids"]  # no second end token
        (text,) = prepared(
            [{"text": f"{MARKED}Yes.{end}"}], tokenizer, "sft", special_tokens="parse"
        )
        assert text["prompt_ids"] + text["response_ids"][0] == whole  # no second begin token
    (open_end,) = prepared(
        [{"prompt": MARKED, "response": "Yes."}], tokenizer, "sft", special_tokens="parse"
    )
    assert open_end["response_ids"][0][-1] == tokenizer.eos_token_id  # added if missing


def test_parsed_pairs(tokenizer: Any) -> None:
    prompt = [TALK[0]]
    (wanted,) = prepared(
        [{"prompt": prompt, "chosen": "Yes.", "rejected": "No."}], tokenizer, "pair"
    )
    for given in (MARKED, prompt):
        row = {"prompt": given, "chosen": "Yes.<|im_end|>", "rejected": "No.<|im_end|>\n"}
        (found,) = prepared([row], tokenizer, "pair", special_tokens="parse")
        assert found["prompt_ids"] == wanted["prompt_ids"]
        assert found["response_ids"] == wanted["response_ids"]


def test_parsed_prompts_to_sample_from(tokenizer: Any) -> None:
    wanted = encode_prompt(tokenizer, [TALK[0]])
    assert encode_prompt(tokenizer, MARKED, parsed=True) == wanted
    assert encode_prompt(tokenizer, MARKED.removeprefix("<s>"), parsed=True) == wanted
    assert encode_prompt(tokenizer, MARKED) != wanted


def test_text_by_default(tokenizer: Any) -> None:
    for how in (None, "text"):
        (found,) = prepared([{"text": MARKED + "Yes."}], tokenizer, "sft", special_tokens=how)
        ids = found["prompt_ids"] + found["response_ids"][0]
        assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in ids


def load(folder: Path, jsonl: Any, source: Any, rows: list[Any], how: str | None) -> list[Any]:
    given = source(jsonl(rows), special_tokens=how)
    return load_rows([given], kind="sft", base_dir=folder, audit=Audit(), seed=0)


@pytest.mark.parametrize("marked", [5, 6])
def test_most_rows_with_control_tokens_are_an_error_of_the_source(
    marked: int, tmp_path: Path, jsonl: Any, source: Any, tokenizer: Any
) -> None:
    rows = [{"text": MARKED if i < marked else "Hello"} for i in range(10)]
    options: dict[str, Any] = {"kind": "sft", "max_length": 500, "truncation": "drop"}
    options["refuse_special_text"] = True
    for how in (None, "text", "parse"):
        audit = Audit()
        found = load(tmp_path, jsonl, source, rows, how)
        if how is None and marked > 5:
            with raises("data.special-token-text", DataError, where="rows.jsonl") as error:
                tokenize_rows(found, tokenizer, audit=audit, **options)
            assert "60%" in error.value.what and "(6 of 10)" in error.value.what
            assert "<|im_start|>" in error.value.what
            for value in ("parse", "text"):
                assert f"special_tokens: {value}" in str(error.value.fix)
            continue
        tokenize_rows(found, tokenizer, audit=audit, **options)
        told = [(level, text) for level, text in audit.messages() if "special token" in text]
        if how is None:
            assert [level for level, _ in told] == [logging.WARNING]
            assert "5 rows" in told[0][1]
        else:
            assert not told


def test_in_the_library_it_is_a_warning(tokenizer: Any) -> None:
    audit = Audit()
    prepared([{"text": MARKED}] * 3, tokenizer, "sft", audit=audit)
    (said,) = [text for level, text in audit.messages() if 'special_tokens="parse"' in text]
    assert "100%" in said and "<|im_end|>" in said


def test_thinking_tags_are_not_control_tokens(make_tokenizer: Callable[..., Any]) -> None:
    """Most rows of a reasoning model contain them, although no template wrote them."""
    tokenizer = make_tokenizer(["</s>"], eos="</s>", chat_template=TEMPLATE)
    tokenizer.add_tokens(["<think>", "</think>"])
    rows = [{"text": "<think>so</think> yes"}] * 3
    found = [
        {"id": str(i), "source": "s", "prompt": "", "response": r["text"]}
        for i, r in enumerate(rows)
    ]
    audit = Audit()
    tokenize_rows(
        found, tokenizer, kind="sft", max_length=99, truncation="drop", audit=audit,
        refuse_special_text=True,
    )  # fmt: skip
    assert not audit.remarks
