"""Built-in chat templates, setting a template on a tokenizer, and fixing the date that it writes."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rpo_trainer.data.template_limits import check_template_limits
from rpo_trainer.errors import ModelError
from rpo_trainer.runtime.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tools and tool calls are written as JSON.
_CALLS = "{{ (m.tool_calls | tojson) if m.tool_calls else '' }}"

CHATML = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "Tools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if not (tools and loop.first and m.role == 'system') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}" + _CALLS + "<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Needs no tokens except EOS. The space after "Assistant:" belongs to the response, since most tokenizers
# merge it with the first word of the response.
PLAIN = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "Assistant: {{ m.content | trim }}" + _CALLS + "{{ eos_token }}\n"
    "{% else %}{{ m.role | capitalize }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

BUILT_IN = {"chatml": CHATML, "plain": PLAIN}
MAX_BYTES = 2**20  # of a template file; the longest published templates have 30,000
# The default date of the first templates that used `strftime_now`.
DATE = datetime.datetime(2024, 7, 26)
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.+?)\1\s*\)")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, name_or_path: str | Path | None
) -> PreTrainedTokenizerBase:
    """Set the chat template of `tokenizer` and return the tokenizer.

    Args:
        name_or_path: `chatml`, `plain`, the path of a Jinja file, or None for the tokenizer's own template.

    Raises:
        ModelError: no such name or file; the tokenizer lacks ChatML's tokens or an EOS token; or the template
            does not terminate.
    """
    if name_or_path is None:
        check_template_limits(tokenizer, "the tokenizer's own chat template")
        return tokenizer
    name = str(name_or_path)
    if name in BUILT_IN:
        _check_tokens(tokenizer, name)
        tokenizer.chat_template = BUILT_IN[name]
        return tokenizer
    try:
        tokenizer.chat_template = read_text(Path(name), MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the chat template {name!r} cannot be read ({error})",
            code="template.unreadable",
            where="model.chat_template",
            fix=f"use {', '.join(BUILT_IN)}, or the path of a Jinja template",
        ) from None
    check_template_limits(tokenizer, "model.chat_template")
    return tokenizer


def _check_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if name == "chatml" and not added.issuperset(CHATML_TOKENS):
        raise ModelError(
            f"the tokenizer lacks the tokens {' and '.join(CHATML_TOKENS)}",
            code="template.missing-tokens",
            where="model.chat_template",
            why="ChatML markers would be tokenized as words, without an end-of-turn token",
            fix="use `chat_template: plain`",
        )
    if name == "plain" and tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no EOS token",
            code="tokenizer.no-end-token",
            where="model.chat_template",
            why="a model trained without it never ends a response",
            fix="set `eos_token` in tokenizer_config.json",
        )


def stop_clock(template: str) -> str:
    """Return `template` with a fixed date.

    Otherwise the tokens, and with them the reference log-probs, would change from day to day.
    """
    template = CLOCK.sub(lambda match: repr(DATE.strftime(match[2])), template)
    if "strftime_now(" not in template:
        return template
    # The format is not a literal: define a macro of the same name, which is slower.
    parts = "".join(f".replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "AaBbdeHIjMmpSYy")
    clock = "{%- macro strftime_now(form) -%}{{ form" + parts + " }}{%- endmacro -%}"
    return clock + template
