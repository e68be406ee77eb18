"""A minimal template for each structure found in published chat templates, with its tokens.

`CASES` are conversations: what each shape must train of them is in `test_chat_shapes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .chat_formats import FORMATS

Chat = list[dict[str, Any]]

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def said(text: str, thought: str = "", city: str = "") -> dict[str, Any]:
    """An assistant turn, optionally with thinking and a tool call."""
    turn: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        turn["reasoning_content"] = thought
    function = {"name": "weather", "arguments": {"city": city}}
    call = {"id": "call00001", "type": "function", "function": function}
    return {**turn, "tool_calls": [call]} if city else turn


USER, TOOL = {"role": "user", "content": "Hi?"}, {"role": "tool", "content": "rain"}
SURE = {"role": "user", "content": "Sure?"}
CASES: dict[str, Chat] = {
    "plain": [USER, said("Four.")],
    "system": [{"role": "system", "content": "Be brief."}, USER, said("Four.")],
    "turns": [USER, said("Four."), SURE, said("Yes.")],
    "thought": [USER, said("Four.", "2+2")],
    "inside": [USER, said("<think>\n2+2\n</think>\n\nFour.")],
    "call": [USER, said("", city="Rome")],
    "text, call": [USER, said("I look.", city="Rome")],
    "answer": [USER, said("", city="Rome"), TOOL, said("It rains.")],
    "question": [USER, said("", city="Rome"), TOOL, said("It rains."), SURE, said("Yes.")],
    "thoughts": [
        *(USER, said("", "first", "Rome"), TOOL, said("", "then", "Bern"), TOOL),
        said("It rains.", "last"),
    ],
    "early thoughts": [
        *(USER, said("", "first", "Rome"), TOOL, said("It rains.", "then"), SURE),
        said("Yes.", "last"),
    ],
}


@dataclass(frozen=True)
class Shape:
    """A template, its control tokens, and those that are not marked as special in the tokenizer."""

    template: str
    specials: tuple[str, ...]
    eos: str
    added: tuple[str, ...] = ()
    bos: str | None = None


_LAST = (  # index of the last user turn
    "{% set at = namespace(question=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set at.question = loop.index0 %}{% endif %}{% endfor %}"
)
_SPLIT = (  # thinking and text of a turn
    "{% set words = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in words %}{% set thought = words.split('</think>')[0].split('<think>')[-1] %}"
    "{% set words = words.split('</think>')[-1] %}{% endif %}"
    "{% set thought = thought | trim %}{% set words = words | trim %}"
)
_CUT = "{% set words = m.content.split('</think>')[-1] | trim %}"
_CALL = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
_EACH = "{% for c in m.tool_calls or [] %}"
_TAGGED = _EACH + "<tool_call>\n" + _CALL + "\n</tool_call>{% endfor %}"
_XML = (
    _EACH + "<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for name, value in c.function.arguments.items() %}"
    "<parameter={{ name }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
)
_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def _chatml(assistant: str, opened: str, before: str = "") -> str:
    """ChatML with tool results in a user turn."""
    return (
        _LAST + before + "{% for m in messages %}{% if m.role == 'assistant' %}"
        "<|im_start|>assistant\n" + assistant + "<|im_end|>\n{% elif m.role == 'tool' %}"
        "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + opened + "{% endif %}"
    )


_BLOCK = "<think>\n{{ thought }}\n</think>\n\n"
_RECENT = _SPLIT + "{% if loop.index0 > at.question %}" + _BLOCK + "{% endif %}{{ words }}"
_EMPTY = "<think>\n\n</think>\n\n"

# A call and its result are in one model turn; a call at the end opens the result.
_FOLDED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "response:{{ m.content }}<end_function_response>"
    "{% else %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% endif %}{{ m.content }}"
    + _EACH
    + "<start_function_call>call:{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "<end_function_call>{% endfor %}"
    "{{ '<start_function_response>' if m.tool_calls else '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<start_of_turn>model\n{% endif %}"
)
# The same without a token that opens the result: a call at the end ends the turn.
_JOINED = (
    "{% for m in messages %}{% if m.role == 'tool' %}\n[result]{{ m.content }}[/result]\n"
    "{% else %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "<|{{ m.role }}|>{% endif %}{{ m.content }}" + _EACH + "<call>" + _CALL + "</call>{% endfor %}"
    "{% if not m.tool_calls or loop.last %}<|end|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|assistant|>{% endif %}"
)


def _deepseek(words: str, opened: str) -> str:
    """Arguments are text; the answer follows the results without a heading."""
    return (
        "{{ bos_token }}{% set ns = namespace(tool=false) %}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'tool' %}{% if not ns.tool %}<｜tool▁outputs▁begin｜>{% endif %}"
        "{% set ns.tool = true %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
        "{% elif m.role == 'assistant' %}{{ '<｜tool▁outputs▁end｜>' if ns.tool else '<｜Assistant｜>' }}"
        "{% set ns.tool = false %}" + words + "{% if m.tool_calls %}<｜tool▁calls▁begin｜>" + _EACH
        + "{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\n```json\n'"
        " + c.function.arguments + '\n```<｜tool▁call▁end｜>' }}"
        "{% endfor %}<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<｜tool▁outputs▁end｜>' if ns.tool else '<｜Assistant｜>" + opened + "' }}{% endif %}"
    )  # fmt: skip


_DS = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
    ),
    *("<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)

# The system prompt is in the user turn at the end of the conversation, and omitted if an answer follows.
_MISTRAL = (
    "{{ bos_token }}{% set system = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content ~ '\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}{% for m in turns %}"
    "{% if m.role == 'user' %}[INST]{{ system if loop.last }}{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS][" + _EACH + _CALL + "{% endfor %}]{{ eos_token }}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Thinking has its own control tokens.
_MAGISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}"
    "{% if m.thinking %}[THINK]{{ m.thinking }}[/THINK]{% endif %}{{ m.content }}"
    + _EACH
    + "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
_TURN, _OVER = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
_COHERE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    + _TURN
    + "<|CHATBOT_TOKEN|>"
    "{% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|>{% endif %}"
    "{% if m.content %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}"
    "{% if m.tool_calls %}<|START_ACTION|>["
    + _EACH
    + _CALL
    + "{% endfor %}]<|END_ACTION|>{% endif %}"
    "{% else %}" + _TURN + "<|{{ {'tool': 'SYSTEM'}.get(m.role, m.role | upper) }}_TOKEN|>"
    "{{ '<|START_TOOL_RESULT|>' ~ m.content ~ '<|END_TOOL_RESULT|>' if m.role == 'tool' else m.content }}"
    "{% endif %}"
    + _OVER
    + "{% endfor %}{% if add_generation_prompt %}"
    + _TURN
    + "<|CHATBOT_TOKEN|>{% endif %}"
)
# The next model turn is always opened at the end of the conversation.
_OPENED = _COHERE.replace("{% if add_generation_prompt %}", "")
_OPENED = _OPENED.removesuffix("{% endif %}")
# Thinking is omitted from a call that is followed by an answer; the final answer has a different end marker.
_HARMONY = (
    "{% set ns = namespace(final=-1) %}{% for m in messages %}"
    "{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set told = m.content if m.tool_calls and m.content else m.thinking %}"
    "{% if told and (loop.last or (m.tool_calls and loop.index0 > ns.final)) %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ told }}<|end|>{% endif %}"
    "{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
    "<|start|>assistant to=functions.{{ c.name }}<|channel|>commentary json<|message|>"
    "{{ c.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n{{ m.content }}"
    + _EACH
    + '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{{ '<|eom_id|>' if m.tool_calls else '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ 'tool_response' if m.role == 'tool' else m.role }}"
    "<|end_of_role|>{{ m.content }}{% if m.tool_calls %}<|tool_call|>["
    + _EACH
    + _CALL
    + "{% endfor %}]{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
# A further token ends the conversation.
_PHI4_MINI = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}<|tool_call|>["
    + _EACH
    + _CALL
    + "{% endfor %}]<|/tool_call|>{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}"
)
# No end markers: the token of the next role ends a turn.
_GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{% if m.tool_calls %}<|assistant|>"
    "{{ m.tool_calls[0].function.name }}\n{{ m.tool_calls[0].function.arguments | tojson }}"
    "{% else %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_GLM45 = (
    "[gMASK]<sop>" + _LAST + "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
    + _SPLIT
    + "<think>{{ thought if loop.index0 > at.question }}</think>{{ '\n' ~ words if words }}"
    + "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)  # fmt: skip
# The template's own system prompt mentions the thinking markers, which are not control tokens.
_NAMED = "{% if messages[0].role != 'system' %}<|im_start|>system\nWrite <think> thoughts </think>"
_NAMED += "<|im_end|>\n{% endif %}"

_GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")
_GLM += ("<|observation|>",)
_COMMAND = (
    *("<BOS>", _TURN, _OVER, "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    *("<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
)
_S = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")

SHAPES: dict[str, Shape] = {
    "qwen3": Shape(str(FORMATS["qwen3"].template), _IM, "<|im_end|>", _TAGS),
    "opened thought": Shape(_chatml(_RECENT + _TAGGED, "<think>\n"), _IM, "<|im_end|>", _TAGS),
    "empty thought": Shape(_chatml(_RECENT + _TAGGED, _EMPTY), _IM, "<|im_end|>", _TAGS),
    "xml call": Shape(_chatml(_RECENT + _XML, "<think>\n"), _IM, "<|im_end|>", _TAGS),
    "cut thought": Shape(
        _chatml(_CUT + "{{ words }}" + _TAGGED, "<think>\n"), _IM, "<|im_end|>", _TAGS
    ),
    "named marks": Shape(
        _chatml("{{ m.content }}" + _TAGGED, "", _NAMED), _IM, "<|im_end|>", _TAGS
    ),
    "hermes": Shape(_chatml("{{ m.content }}" + _TAGGED, ""), _IM, "<|im_end|>", _TAGS[2:]),
    "deepseek": Shape(_deepseek("{{ m.content }}", ""), _DS, _DS[1], bos=_DS[0]),
    "deepseek r1": Shape(
        _deepseek(_CUT + "{{ words }}", "<think>\n"), _DS, _DS[1], _TAGS[:2], bos=_DS[0]
    ),
    "mistral": Shape(_MISTRAL, _S, "</s>", bos="<s>"),
    "magistral": Shape(
        _MAGISTRAL, (*_S, "[THINK]", "[/THINK]", "[ARGS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "</s>", bos="<s>",
    ),
    "cohere": Shape(_COHERE, _COMMAND, _OVER, bos="<BOS>"),
    "always opened": Shape(_OPENED, _COMMAND, _OVER, bos="<BOS>"),
    "harmony": Shape(
        _HARMONY,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
        "<|return|>",
    ),
    "llama": Shape(
        _LLAMA,
        ("<|bot|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        "<|eot_id|>", bos="<|bot|>",
    ),
    "granite": Shape(
        _GRANITE, ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        "<|end_of_text|>",
    ),
    "phi4 mini": Shape(
        _PHI4_MINI,
        (
            *("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|endoftext|>"),
            *("<|tool_call|>", "<|/tool_call|>"),
        ),
        "<|endoftext|>",
    ),
    "glm4": Shape(_GLM4, _GLM, "<|endoftext|>"),
    "glm45": Shape(_GLM45, _GLM, "<|endoftext|>", _TAGS),
    "folded result": Shape(
        _FOLDED,
        (
            *("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_function_call>"),
            *("<end_function_call>", "<start_function_response>", "<end_function_response>"),
        ),
        "<eos>", bos="<bos>",
    ),
    "joined result": Shape(
        _JOINED, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<call>", "</call>"), "<|end|>"
    ),
}  # fmt: skip
