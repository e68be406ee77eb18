"""What each tokenizer and template that cannot be used must get, and those that must work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.data import Audit, set_chat_template, tokenize_rows
from rpo_trainer.errors import DataError, ModelError

from .conftest import CHATML_SPECIALS, trained_texts

CHAT = {
    "id": "r0",
    "source": "s",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}],
}
TEXT = {"id": "r0", "source": "s", "prompt": "q: ", "response": "yes"}
FIX = (
    "  why: the loss is on what the assistant says, so its tokens must be known\n"
    "  fix: correct the rows, or choose another chat_template: chatml | plain | a path"
)


def tokenized(row: dict[str, Any], tokenizer: Any) -> Any:
    return tokenize_rows(
        [row], tokenizer, kind="sft", max_length=99, truncation="drop", audit=Audit()
    )


def trained(row: dict[str, Any], tokenizer: Any) -> list[str]:
    data = tokenized(row, tokenizer)
    return trained_texts(tokenizer, data[0]["response_ids"][0], data[0]["response_mask"][0])


def test_no_chat_template_where_messages_need_one(plain_text: Any) -> None:
    with pytest.raises(DataError) as error:
        tokenized(CHAT, plain_text)
    assert error.value.exit_code == 3
    assert str(error.value) == (
        "model.chat_template: the rows are messages, and the tokenizer has no chat template\n"
        "  why: how a model is shown its turns is its own, and cannot be guessed\n"
        "  fix: chat_template: chatml | plain | the path of a Jinja template"
    )
    assert trained(TEXT, plain_text) == ["yes</s>"]  # texts do without


def test_no_end_token(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(["<x>"])
    with pytest.raises(ModelError) as error:
        tokenized(TEXT, tokenizer)
    assert error.value.exit_code == 2
    assert str(error.value) == (
        "the tokenizer has no end token\n"
        "  why: a response that does not end is never a whole one\n"
        "  fix: set eos_token in tokenizer_config.json"
    )
    with pytest.raises(ModelError) as error:
        set_chat_template(tokenizer, "plain")
    assert str(error.value) == (
        "model.chat_template: the tokenizer has no end token\n"
        "  why: a response without one never ends\n"
        "  fix: set eos_token in tokenizer_config.json"
    )


def test_chatml_without_its_tokens(plain_text: Any) -> None:
    with pytest.raises(ModelError) as error:
        set_chat_template(plain_text, "chatml")
    assert str(error.value) == (
        "model.chat_template: the tokenizer has no tokens <|im_start|> and <|im_end|>\n"
        "  why: ChatML would be cut into pieces of words, with no end token\n"
        "  fix: chat_template: plain"
    )


def test_a_chat_template_that_is_not_there(plain_text: Any) -> None:
    with pytest.raises(ModelError) as error:
        set_chat_template(plain_text, "absent.jinja")
    assert str(error.value) == (
        "model.chat_template: the chat template 'absent.jinja' cannot be read "
        "([Errno 2] No such file or directory: 'absent.jinja')\n"
        "  why: without it the turns of a conversation become no text\n"
        "  fix: chatml | plain | the path of a Jinja template"
    )


TEMPLATES = {
    "is no Jinja": ("{% for m in %}", "the chat template refuses the row (Expected an expression"),
    "refuses the row": ("{{ raise_exception('no!') }}", "the chat template refuses the row (no!)"),
    "asks for what is not there": (
        "{{ messages[5].content }}</s>",
        "the chat template refuses the row (list object has no element 5)",
    ),
    "writes no end marker": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "the chat template writes no end marker after the assistant's turn",
    ),
    "leaves the turns out": (
        "{% for m in messages %}{{ m.role }}</s>{% endfor %}",
        "the chat template rewrites the conversation so that the assistant's turn cannot be found",
    ),
    "rewrites the whole": (
        "{{ messages | length }}{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}",
        "the chat template rewrites the conversation so that the assistant's turn cannot be found",
    ),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that(make_tokenizer: Callable[..., Any], case: str) -> None:
    template, reason = TEMPLATES[case]
    tokenizer = make_tokenizer(["</s>"], eos="</s>", chat_template=template)
    with pytest.raises(DataError) as error:
        tokenized(CHAT, tokenizer)
    assert error.value.exit_code == 3
    text = str(error.value)
    assert text.startswith(reason)
    assert text.endswith(f": 1 of 1 rows, first r0\n{FIX}")


def test_a_slow_tokenizer() -> None:
    class Slow:
        is_fast = False

        def __init__(self) -> None:
            self.added_tokens_decoder: dict[int, Any] = {}

    with pytest.raises(ModelError) as error:
        tokenized(TEXT, Slow())
    assert str(error.value) == (
        "the tokenizer is a slow one, without character offsets\n"
        "  why: response masks are made from the offsets\n"
        "  fix: use the fast tokenizer of the model (tokenizer.json)"
    )


# ---------------------------------------------------------------- what must work


def test_no_pad_token(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = set_chat_template(make_tokenizer(CHATML_SPECIALS, eos="<|im_end|>"), "chatml")
    assert tokenizer.pad_token is None
    assert trained(CHAT, tokenizer) == ["yes<|im_end|>"]


def test_pad_token_equal_to_the_end_token(make_tokenizer: Callable[..., Any]) -> None:
    """The end is trained all the same: the mask does not come from the ids."""
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
