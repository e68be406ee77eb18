"""Chat formats of well-known model families, as templates written for these tests.

Each format follows the family's documentation: tokens, white space, and rendering of system prompts, tools
and thinking. `Format.text` implements the same format in Python, to check the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Chat = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ChatFormat:
    """One family.

    Attributes:
        template: Jinja.
        specials: its control tokens.
        text: chat of (system,) user and assistant turns → the rendered text.
        turn: content of an assistant turn, and whether it is the last → what is trained of it.
        prompt_end: the generation prompt.
        swallows: control tokens that take the white space behind them with them.
    """

    template: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    text: Callable[[Chat], str]
    turn: Callable[[str, bool], str]
    prompt_end: str
    adds_begin: bool = False
    takes_system: bool = True
    swallows: bool = False


def split_system(chat: Chat) -> tuple[str | None, Chat]:
    if chat[0]["role"] == "system":
        return chat[0]["content"], chat[1:]
    return None, chat


# ---------------------------------------------------------------- Llama 2

# The system prompt is part of the first user turn; each exchange begins with a BOS token.
_LLAMA2 = (
    "{% set sys = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}"
    "{% set sys = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns of user and assistant must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ ((sys if loop.first else '') ~ m.content) | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


def _llama2(chat: Chat) -> str:
    system, turns = split_system(chat)
    out = ""
    for i, m in enumerate(turns):
        if m["role"] == "user":
            lead = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None and i == 0 else ""
            out += f"<s>[INST] {(lead + m['content']).strip()} [/INST]"
        else:
            out += f" {m['content'].strip()} </s>"
    return out


# ---------------------------------------------------------------- Llama 3 and 3.1

_L3_TURN = "<|start_header_id|>{{ %s }}<|end_header_id|>\n\n"
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    + _L3_TURN % "m.role"
    + "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}" + _L3_TURN % "'assistant'" + "{% endif %}"
)


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _llama3(chat: Chat) -> str:
    turns = [f"{_header(m['role'])}{m['content'].strip()}<|eot_id|>" for m in chat]
    return "<|begin_of_text|>" + "".join(turns)


# A system turn with two dates is always written; tools are in the first user turn.
_LLAMA31 = (
    "{{ bos_token }}{% set sys = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content | trim %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% if strftime_now is defined %}{% set fmt = '%d %b %Y' %}{% set today = strftime_now(fmt) %}"
    "{% else %}{% set today = '26 Jul 2024' %}{% endif %}"
    + _L3_TURN
    % "'system'"
    + "{% if tools %}Environment: ipython\n{% endif %}"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ today }}\n\n{{ sys }}<|eot_id|>"
    "{% for m in turns %}"
    "{% if m.tool_calls %}"
    + _L3_TURN
    % "'assistant'"
    + '{"name": {{ m.tool_calls[0].function.name | tojson }}, "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>"
    "{% elif m.role == 'tool' %}" + _L3_TURN % "'ipython'" + "{{ m.content }}<|eot_id|>"
    "{% else %}"
    + _L3_TURN
    % "m.role"
    + "{% if tools and loop.first %}Functions: {{ tools | tojson }}\n\n{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + _L3_TURN % "'assistant'" + "{% endif %}"
)


def _llama31(chat: Chat) -> str:
    system, turns = split_system(chat)
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    head = {"role": "system", "content": "x"}
    return _llama3([head, *turns]).replace("x<", f"{dates}{(system or '').strip()}<", 1)


# ---------------------------------------------------------------- ChatML, Qwen 2.5 and 3

_QWEN_TOOLS = (
    "{% if tools %}\n\n# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}"
    "\n</tools>{% endif %}"
)
_QWEN_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\\n' if m.content or CALLED }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
)
# Tool results are in a user turn; consecutive results share one.
_QWEN_ANSWER = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
# Qwen 2.5 writes a line break before a call without text, Qwen 3 does not.
_QWEN25_CALLS = _QWEN_CALLS.replace("CALLED", "true")
_QWEN3_CALLS = _QWEN_CALLS.replace("CALLED", "not loop.first")
_QWEN_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_QWEN25 = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% else %}You are a helpful assistant.{% endif %}" + _QWEN_TOOLS + "<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'tool' %}" + _QWEN_ANSWER + "{% elif not (loop.first"
    " and m.role == 'system') %}<|im_start|>{{ m.role }}{{ '\\n' ~ m.content if m.content }}"
    "" + _QWEN25_CALLS + "<|im_end|>\n{% endif %}{% endfor %}" + _QWEN_END
)
# Thinking is only kept after the last user turn; the last turn always has a thinking block.
_QWEN3 = (
    "{% set at = namespace(question=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set at.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools or messages[0].role == 'system' %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + _QWEN_TOOLS
    + "<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    + _QWEN_ANSWER
    + "{% elif m.role == 'assistant' %}"
    "{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text and not thought %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > at.question and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{{ text.lstrip('\\n') }}"
    "{% else %}{{ text }}{% endif %}" + _QWEN3_CALLS + "<|im_end|>\n"
    "{% elif not (loop.first and m.role == 'system') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + _QWEN_END
)


def _chatml(chat: Chat) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)


def _qwen25(chat: Chat) -> str:
    default = {"role": "system", "content": "You are a helpful assistant."}
    return _chatml(chat if chat[0]["role"] == "system" else [default, *chat])


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def _qwen3(chat: Chat) -> str:
    *before, last = chat
    if last["role"] == "assistant":
        last = {**last, "content": EMPTY_THOUGHT + last["content"].lstrip("\n")}
    return _chatml([*before, last])


# ---------------------------------------------------------------- Gemma

_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns of user and assistant must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _gemma(chat: Chat) -> str:
    names = {"assistant": "model", "user": "user"}
    turns = [
        f"<start_of_turn>{names[m['role']]}\n{m['content'].strip()}<end_of_turn>\n" for m in chat
    ]
    return "<bos>" + "".join(turns)


# ---------------------------------------------------------------- Mistral

# The system prompt is in the last user turn, so it moves as a conversation grows.
_MISTRAL = (
    "{% set sys = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set sys = messages[0].content ~ '\\n\\n' %}{% set turns = messages[1:] %}{% endif %}"
    "{% set at = namespace(question=0) %}{% for m in turns %}{% if m.role == 'user' %}"
    "{% set at.question = loop.index0 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
    "[INST] {{ (sys if loop.index0 == at.question else '') ~ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def _mistral(chat: Chat) -> str:
    system, turns = split_system(chat)
    last = max(i for i, m in enumerate(turns) if m["role"] == "user")
    out = "<s>"
    for i, m in enumerate(turns):
        lead = f"{system}\n\n" if system is not None and i == last else ""
        out += (
            f"[INST] {lead}{m['content']}[/INST]" if m["role"] == "user" else f" {m['content']}</s>"
        )
    return out


# ---------------------------------------------------------------- Phi-3, Zephyr, Vicuna

# At the end of the conversation the EOS token follows the end-of-turn marker.
_PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def _phi3(chat: Chat) -> str:
    return "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in chat) + "<|endoftext|>"


# The roles are words, not tokens.
_ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)


def _zephyr(chat: Chat) -> str:
    return "".join(f"<|{m['role']}|>\n{m['content']}</s>\n" for m in chat)


_VICUNA_HEAD = "A chat between a curious user and an assistant."
_VICUNA = (
    "{% set sys = '" + _VICUNA_HEAD + "' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
    "{% set turns = messages[1:] %}{% endif %}{{ sys }} "
    "{% for m in turns %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _vicuna(chat: Chat) -> str:
    system, turns = split_system(chat)
    out = f"{_VICUNA_HEAD if system is None else system} "
    for m in turns:
        user = m["role"] == "user"
        out += f"USER: {m['content']} " if user else f"ASSISTANT: {m['content']}</s>"
    return out


_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_L3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom|>")
_S = ("<s>", "</s>")

FORMATS: dict[str, ChatFormat] = {
    "llama2": ChatFormat(
        _LLAMA2, _S, "<s>", "</s>", _llama2, lambda t, last: f" {t.strip()} </s>", "[/INST]",
        adds_begin=True,
    ),
    "llama3": ChatFormat(
        _LLAMA3, _L3, _L3[0], "<|eom|>", _llama3, lambda t, last: f"{t.strip()}<|eot_id|>",
        _header("assistant"), adds_begin=True,
    ),
    "llama31": ChatFormat(
        _LLAMA31, _L3, _L3[0], "<|eot_id|>", _llama31, lambda t, last: f"{t.strip()}<|eot_id|>",
        _header("assistant"), adds_begin=True,
    ),
    "chatml": ChatFormat(
        "", _IM, None, "<|im_end|>", _chatml, lambda t, last: f"{t}<|im_end|>",
        "<|im_start|>assistant\n",
    ),
    "qwen25": ChatFormat(
        _QWEN25, _IM, None, "<|im_end|>", _qwen25, lambda t, last: f"{t}<|im_end|>",
        "<|im_start|>assistant\n",
    ),
    "qwen3": ChatFormat(
        _QWEN3, _IM, None, "<|im_end|>", _qwen3,
        lambda t, last: f"{EMPTY_THOUGHT}{t.lstrip(chr(10))}<|im_end|>" if last else f"{t}<|im_end|>",
        "<|im_start|>assistant\n",
    ),
    "gemma": ChatFormat(
        _GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", _gemma,
        lambda t, last: f"{t.strip()}<end_of_turn>", "<start_of_turn>model\n",
        adds_begin=True, takes_system=False,
    ),
    "mistral": ChatFormat(
        _MISTRAL, (*_S, "[INST]", "[/INST]"), "<s>", "</s>", _mistral,
        lambda t, last: f" {t}</s>", "[/INST]", adds_begin=True,
    ),
    "phi3": ChatFormat(
        _PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), None,
        "<|endoftext|>", _phi3, lambda t, last: f"{t}<|end|>", "<|assistant|>\n", swallows=True,
    ),
    "zephyr": ChatFormat(
        _ZEPHYR, _S, "<s>", "</s>", _zephyr, lambda t, last: f"{t}</s>", "<|assistant|>\n",
        adds_begin=True,
    ),
    "vicuna": ChatFormat(
        _VICUNA, _S, "<s>", "</s>", _vicuna, lambda t, last: f" {t}</s>", "ASSISTANT:",
        adds_begin=True,
    ),
}  # fmt: skip


def call_text(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    """A tool call as these templates write it."""
    return f'{{"name": "{name}", "{key}": {json.dumps(arguments)}}}'
