"""Chat templates that come with the package, setting one on a tokenizer, and stopping its clock."""

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

# Tool calls given as data, and the tools themselves, are written as JSON: a model that is to call
# tools must have seen them.
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

# Plain text needs no tokens of its own but the end token. The blank behind "Assistant:" belongs to
# the response, since most tokenizers put it into the response's first token.
PLAIN = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "Assistant: {{ m.content | trim }}" + _CALLS + "{{ eos_token }}\n"
    "{% else %}{{ m.role | capitalize }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

BUILT_IN = {"chatml": CHATML, "plain": PLAIN}
MAX_BYTES = 2**20  # of a template; the longest published ones have 30,000
# The date that the first templates with a clock write where there is none.
DATE = datetime.datetime(2024, 7, 26)
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.+?)\1\s*\)")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, name_or_path: str | Path | None
) -> PreTrainedTokenizerBase:
    """Gives `tokenizer` a chat template and returns it.

    Args:
        name_or_path: `chatml`, `plain`, the path of a Jinja file, or None for the tokenizer's own.

    Raises:
        ModelError: no such name or file; the tokenizer lacks ChatML's tokens, or an end token; a template
            that does not end.
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
            why="without it the turns of a conversation become no text",
            fix=f"{' | '.join(BUILT_IN)} | the path of a Jinja template",
        ) from None
    check_template_limits(tokenizer, "model.chat_template")
    return tokenizer


def _check_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if name == "chatml" and not added.issuperset(CHATML_TOKENS):
        raise ModelError(
            f"the tokenizer has no tokens {' and '.join(CHATML_TOKENS)}",
            code="template.missing-tokens",
            where="model.chat_template",
            why="ChatML would be cut into pieces of words, with no end token",
            fix="chat_template: plain",
        )
    if name == "plain" and tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no end token",
            code="tokenizer.no-end-token",
            where="model.chat_template",
            why="a response without one never ends",
            fix="set eos_token in tokenizer_config.json",
        )


def stop_clock(template: str) -> str:
    """`template` with a clock that stands still.

    Otherwise tomorrow's tokens, and with them the reference log-probs, would be others.
    """
    template = CLOCK.sub(lambda match: repr(DATE.strftime(match[2])), template)
    if "strftime_now(" not in template:
        return template
    # The form comes from elsewhere: a macro of the same name, which is slower.
    parts = "".join(f".replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "AaBbdeHIjMmpSYy")
    clock = "{%- macro strftime_now(form) -%}{{ form" + parts + " }}{%- endmacro -%}"
    return clock + template
