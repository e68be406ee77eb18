"""Unusable tokenizers and templates are refused; unusual ones work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.data import Audit, set_chat_template, tokenize_rows
from rpo_trainer.errors import DataError, ModelError
from tests.raising import raises

from .conftest import CHATML_SPECIALS, trained_texts

CHAT = {
    "id": "r0",
    "source": "s",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}],
}
TEXT = {"id": "r0", "source": "s", "prompt": "q: ", "response": "yes"}


def tokenized(row: dict[str, Any], tokenizer: Any) -> Any:
    return tokenize_rows(
        [row], tokenizer, kind="sft", max_length=99, truncation="drop", audit=Audit()
    )


def trained(row: dict[str, Any], tokenizer: Any) -> list[str]:
    data = tokenized(row, tokenizer)
    return trained_texts(tokenizer, data[0]["response_ids"][0], data[0]["response_mask"][0])


def test_no_chat_template_where_messages_need_one(plain_text: Any) -> None:
    with raises("template.missing", DataError, where="model.chat_template", exit_code=3) as error:
        tokenized(CHAT, plain_text)
    assert "chatml, plain" in str(error.value.fix)
    assert trained(TEXT, plain_text) == ["yes</s>"]  # text needs no template


def test_no_end_token(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(["<x>"])
    with raises("tokenizer.no-end-token", ModelError, where=None, exit_code=2) as error:
        tokenized(TEXT, tokenizer)
    assert "eos_token" in str(error.value.fix)
    with raises("tokenizer.no-end-token", ModelError, where="model.chat_template") as error:
        set_chat_template(tokenizer, "plain")
    assert "eos_token" in str(error.value.fix)


def test_chatml_without_its_tokens(plain_text: Any) -> None:
    with raises("template.missing-tokens", ModelError, where="model.chat_template") as error:
        set_chat_template(plain_text, "chatml")
    assert "<|im_start|>" in error.value.what and "<|im_end|>" in error.value.what


def test_a_chat_template_that_is_not_there(plain_text: Any) -> None:
    with raises("template.unreadable", ModelError, where="model.chat_template") as error:
        set_chat_template(plain_text, "absent.jinja")
    assert "'absent.jinja'" in error.value.what and "[Errno 2]" in error.value.what
    assert "chatml, plain" in str(error.value.fix)


TEMPLATES = {
    "is no Jinja": ("{% for m in %}", "template.refuses-row", "(Expected an expression"),
    "refuses rows": ("{{ raise_exception('no!') }}", "template.refuses-row", "(no!)"),
    "asks for what is not there": (
        "{{ messages[5].content }}</s>",
        "template.refuses-row",
        "no element 5)",
    ),
    "has no end marker": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "template.no-end-marker",
        "",
    ),
    "leaves the turns out": (
        "{% for m in messages %}{{ m.role }}</s>{% endfor %}",
        "template.turn-not-found",
        "",
    ),
    "rewrites the whole": (
        "{{ messages | length }}{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}",
        "template.turn-not-found",
        "",
    ),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that(make_tokenizer: Callable[..., Any], case: str) -> None:
    template, code, said = TEMPLATES[case]
    tokenizer = make_tokenizer(["</s>"], eos="</s>", chat_template=template)
    with raises(code, DataError, exit_code=3, rows=["r0"], of=1) as error:
        tokenized(CHAT, tokenizer)
    assert said in error.value.what


def test_a_slow_tokenizer() -> None:
    class Slow:
        is_fast = False

        def __init__(self) -> None:
            self.added_tokens_decoder: dict[int, Any] = {}

    with raises("tokenizer.no-offsets", ModelError) as error:
        tokenized(TEXT, Slow())
    assert "tokenizer.json" in str(error.value.fix)


# ---------------------------------------------------------------- accepted tokenizers


def test_no_pad_token(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = set_chat_template(make_tokenizer(CHATML_SPECIALS, eos="<|im_end|>"), "chatml")
    assert tokenizer.pad_token is None
    assert trained(CHAT, tokenizer) == ["yes<|im_end|>"]


def test_pad_token_equal_to_the_end_token(make_tokenizer: Callable[..., Any]) -> None:
    """The end token is trained even so: the mask is not derived from the ids."""
    for specials, end, row in ((CHATML_SPECIALS, "<|im_end|>", CHAT), (["</s>"], "</s>", TEXT)):
        tokenizer = make_tokenizer(specials, eos=end)
        tokenizer.pad_token = end
        if row is CHAT:
            set_chat_template(tokenizer, "chatml")
        assert trained(row, tokenizer) == [f"yes{end}"]


@pytest.mark.parametrize("adds_begin", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_the_begin_token_is_there_once(
    make_tokenizer: Callable[..., Any], adds_begin: bool, written: bool
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    if written:
        template = "{{ bos_token }}" + template
    tokenizer = make_tokenizer(
        ["<s>", "</s>"], bos="<s>", eos="</s>", adds_begin=adds_begin, chat_template=template
    )
    data = tokenized(CHAT, tokenizer)
    ids = data[0]["prompt_ids"] + data[0]["response_ids"][0]
    begins = int(adds_begin or written)
    assert ids.count(tokenizer.bos_token_id) == begins
    assert (ids[0] == tokenizer.bos_token_id) == bool(begins)
