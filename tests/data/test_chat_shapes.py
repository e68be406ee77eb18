"""Trained text under each structure of chat templates: the text that the model generates, with its end
marker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.data import Audit, encode_prompt, end_token_ids, tokenize_rows

from .chat_shapes import CASES, SHAPES
from .conftest import trained_texts

Trained = dict[str, list[str]]


def without_thinking(
    answer: str, call: str, *, inner: str = "", text: str = "", inside: str = ""
) -> Trained:
    """Trained text of a template without thinking: `~` is replaced by the words, or the city of the call.

    Args:
        inner: a call followed by its result, if it differs from `call`, which is the last turn.
        text: a call after words, if they do not precede `call`.
        inside: an answer whose content has thinking.
    """
    inner = inner or call
    four, yes, rains = (answer.replace("~", words) for words in ("Four.", "Yes.", "It rains."))
    rome, bern = (inner.replace("~", city) for city in ("Rome", "Bern"))
    return {
        "plain": [four],
        "system": [four],
        "turns": [four, yes],
        "thought": [four],
        "inside": [inside or answer.replace("~", "<think>\n2+2\n</think>\n\nFour.")],
        "call": [call.replace("~", "Rome")],
        "text, call": [(text or f"I look.{call}").replace("~", "Rome")],
        "answer": [rome, rains],
        "question": [rome, rains, yes],
        "thoughts": [rome, bern, rains],
        "early thoughts": [rome, rains, yes],
    }


JSON = '{"name": "weather", "arguments": {"city": "~"}}'
TAGGED = f"<tool_call>\n{JSON}\n</tool_call><|im_end|>"
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n~\n</parameter>\n</function>\n</tool_call>"
)
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "~"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
)
FOLDED = (
    '<start_function_call>call:weather{"city": "~"}<end_function_call><start_function_response>'
)
HARMONY = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "~"}<|call|>'
GLM45 = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>~</arg_value>\n</tool_call>"
GLM45 += "<|observation|>"
OVER = "<|END_OF_TURN_TOKEN|>"
EMPTY = "<think>\n\n</think>\n\n"


def rome(call: str) -> str:
    return call.replace("~", "Rome")


def bern(call: str) -> str:
    return call.replace("~", "Bern")


def block(thought: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n"


def analysis(thought: str) -> str:
    return f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"


def final(words: str, end: str = "<|return|>") -> str:
    return f"<|channel|>final<|message|>{words}{end}"


def opened(call: str) -> Trained:
    """The generation prompt opens the thinking, which is omitted from turns before the last user turn."""
    close = "\n</think>\n\n"
    return {
        "plain": [f"{close}Four.<|im_end|>"],
        "system": [f"{close}Four.<|im_end|>"],
        "turns": ["Four.<|im_end|>", f"{close}Yes.<|im_end|>"],
        "thought": [f"2+2{close}Four.<|im_end|>"],
        "inside": [f"2+2{close}Four.<|im_end|>"],
        "call": [close + rome(call)],
        "text, call": [f"{close}I look.{rome(call)}"],
        "answer": [close + rome(call), f"{close}It rains.<|im_end|>"],
        "question": [rome(call), "It rains.<|im_end|>", f"{close}Yes.<|im_end|>"],
        "thoughts": [
            f"first{close}{rome(call)}",
            f"then{close}{bern(call)}",
            f"last{close}It rains.<|im_end|>",
        ],
        "early thoughts": [rome(call), "It rains.<|im_end|>", f"last{close}Yes.<|im_end|>"],
    }


TRAINED: dict[str, Trained] = {
    "qwen3": {
        "plain": [f"{EMPTY}Four.<|im_end|>"],
        "system": [f"{EMPTY}Four.<|im_end|>"],
        "turns": ["Four.<|im_end|>", f"{EMPTY}Yes.<|im_end|>"],
        "thought": [f"{block('2+2')}Four.<|im_end|>"],
        "inside": [f"{block('2+2')}Four.<|im_end|>"],
        "call": [EMPTY + rome(TAGGED)],
        "text, call": [f"{EMPTY}I look.\n{rome(TAGGED)}"],
        "answer": [rome(TAGGED), f"{EMPTY}It rains.<|im_end|>"],
        "question": [rome(TAGGED), "It rains.<|im_end|>", f"{EMPTY}Yes.<|im_end|>"],
        "thoughts": [
            block("first") + rome(TAGGED),
            block("then") + bern(TAGGED),
            f"{block('last')}It rains.<|im_end|>",
        ],
        "early thoughts": [
            rome(TAGGED),
            "It rains.<|im_end|>",
            f"{block('last')}Yes.<|im_end|>",
        ],
    },
    "opened thought": opened(TAGGED),
    "xml call": opened(f"{XML}<|im_end|>"),
    "empty thought": {
        **without_thinking("~<|im_end|>", TAGGED),
        "thought": [f"{block('2+2')}Four.<|im_end|>"],
        "thoughts": [
            block("first") + rome(TAGGED),
            block("then") + bern(TAGGED),
            f"{block('last')}It rains.<|im_end|>",
        ],
        "early thoughts": [rome(TAGGED), "It rains.<|im_end|>", f"{block('last')}Yes.<|im_end|>"],
    },
    "cut thought": without_thinking("~<|im_end|>", TAGGED, inside="Four.<|im_end|>"),
    "named marks": without_thinking("~<|im_end|>", TAGGED),
    "hermes": without_thinking("~<|im_end|>", TAGGED),
    "deepseek": without_thinking("~<｜end▁of▁sentence｜>", DEEPSEEK),
    "deepseek r1": without_thinking(
        "~<｜end▁of▁sentence｜>", DEEPSEEK, inside="Four.<｜end▁of▁sentence｜>"
    ),
    "mistral": without_thinking(
        "~</s>", f"[TOOL_CALLS][{JSON}]</s>", text=f"[TOOL_CALLS][{JSON}]</s>"
    ),
    "magistral": {
        **without_thinking("~</s>", '[TOOL_CALLS]weather[ARGS]{"city": "~"}</s>'),
        "thought": ["[THINK]2+2[/THINK]Four.</s>"],
        "inside": ["[THINK]2+2[/THINK]Four.</s>"],
        "thoughts": [
            '[THINK]first[/THINK][TOOL_CALLS]weather[ARGS]{"city": "Rome"}</s>',
            '[THINK]then[/THINK][TOOL_CALLS]weather[ARGS]{"city": "Bern"}</s>',
            "[THINK]last[/THINK]It rains.</s>",
        ],
        "early thoughts": [
            '[THINK]first[/THINK][TOOL_CALLS]weather[ARGS]{"city": "Rome"}</s>',
            "[THINK]then[/THINK]It rains.</s>",
            "[THINK]last[/THINK]Yes.</s>",
        ],
    },
    "cohere": {
        **without_thinking(
            f"<|START_RESPONSE|>~<|END_RESPONSE|>{OVER}",
            f"<|START_ACTION|>[{JSON}]<|END_ACTION|>{OVER}",
            text=f"<|START_RESPONSE|>I look.<|END_RESPONSE|><|START_ACTION|>[{JSON}]<|END_ACTION|>{OVER}",
        ),
        **{
            case: [
                f"<|START_THINKING|>2+2<|END_THINKING|><|START_RESPONSE|>Four.<|END_RESPONSE|>{OVER}"
            ]
            for case in ("thought", "inside")
        },
        "thoughts": [
            f"<|START_THINKING|>first<|END_THINKING|><|START_ACTION|>[{rome(JSON)}]<|END_ACTION|>{OVER}",
            f"<|START_THINKING|>then<|END_THINKING|><|START_ACTION|>[{bern(JSON)}]<|END_ACTION|>{OVER}",
            f"<|START_THINKING|>last<|END_THINKING|><|START_RESPONSE|>It rains.<|END_RESPONSE|>{OVER}",
        ],
        "early thoughts": [
            f"<|START_THINKING|>first<|END_THINKING|><|START_ACTION|>[{rome(JSON)}]<|END_ACTION|>{OVER}",
            f"<|START_THINKING|>then<|END_THINKING|><|START_RESPONSE|>It rains.<|END_RESPONSE|>{OVER}",
            f"<|START_THINKING|>last<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>{OVER}",
        ],
    },
    "harmony": {
        "plain": [final("Four.")],
        "system": [final("Four.")],
        "turns": [final("Four.", "<|end|>"), final("Yes.")],
        "thought": [analysis("2+2") + final("Four.")],
        "inside": [analysis("2+2") + final("Four.")],
        "call": [rome(HARMONY)],
        "text, call": [analysis("I look.") + rome(HARMONY)],
        "answer": [rome(HARMONY), final("It rains.")],
        "question": [rome(HARMONY), final("It rains.", "<|end|>"), final("Yes.")],
        "thoughts": [
            analysis("first") + rome(HARMONY),
            analysis("then") + bern(HARMONY),
            analysis("last") + final("It rains."),
        ],
        "early thoughts": [
            rome(HARMONY),
            final("It rains.", "<|end|>"),
            analysis("last") + final("Yes."),
        ],
    },
    "llama": without_thinking(
        "~<|eot_id|>", '{"name": "weather", "parameters": {"city": "~"}}<|eom_id|>'
    ),
    "granite": without_thinking("~<|end_of_text|>", f"<|tool_call|>[{JSON}]<|end_of_text|>"),
    "phi4 mini": without_thinking("~<|end|>", f"<|tool_call|>[{JSON}]<|/tool_call|><|end|>"),
    "glm4": without_thinking(
        "\n~<|user|>",
        'weather\n{"city": "~"}<|observation|>',
        text='weather\n{"city": "~"}<|observation|>',
    ),
    "glm45": {
        **without_thinking(
            "<think></think>\n~<|user|>",
            f"<think></think>{GLM45}",
            text=f"<think></think>\nI look.{GLM45}",
            inside="<think>2+2</think>\nFour.<|user|>",
        ),
        "thought": ["<think>2+2</think>\nFour.<|user|>"],
        "thoughts": [
            f"<think>first</think>{rome(GLM45)}",
            f"<think>then</think>{bern(GLM45)}",
            "<think>last</think>\nIt rains.<|user|>",
        ],
        "early thoughts": [
            f"<think></think>{rome(GLM45)}",
            "<think></think>\nIt rains.<|user|>",
            "<think>last</think>\nYes.<|user|>",
        ],
    },
    "folded result": without_thinking("~<end_of_turn>", FOLDED),
    "joined result": without_thinking(
        "~<|end|>", f"<call>{JSON}</call><|end|>", inner=f"<call>{JSON}</call>"
    ),
}
TRAINED["always opened"] = TRAINED["cohere"]
NO_THINKING = {
    *("hermes", "named marks", "deepseek", "mistral", "llama", "granite", "phi4 mini", "glm4"),
    *("folded result", "joined result", "cut thought", "deepseek r1"),
}
EARLY = ("qwen3", "opened thought", "xml call", "empty thought", "harmony", "glm45")
# Structures that omit text, and the cases in which they do.
LEFT_OUT = {
    **{name: {"thought", "thoughts", "early thoughts"} for name in NO_THINKING},
    **{name: {"early thoughts"} for name in EARLY},
}
for _name in ("cut thought", "deepseek r1"):
    LEFT_OUT[_name].add("inside")
for _name in ("mistral", "glm4"):
    LEFT_OUT[_name].add("text, call")
# Structures whose prompt for generation differs from training, and the cases; `*`: before the last turn.
QUESTIONS = {"turns", "question", "early thoughts"}
DIFFERS = {
    **{name: {"early thoughts"} for name in ("qwen3", "harmony", "glm45")},
    **dict.fromkeys(("opened thought", "xml call"), QUESTIONS),
    "empty thought": {*QUESTIONS, "thought*", "inside*", "thoughts*", "early thoughts*"},
    "cut thought": {f"{case}*" for case in CASES},
    "deepseek r1": {
        "answer",
        "thoughts",
        *(f"{c}*" for c in CASES if c not in ("answer", "thoughts")),
    },
}
ENDS = {
    "deepseek": ["<｜end▁of▁sentence｜>"], "deepseek r1": ["<｜end▁of▁sentence｜>"],
    "mistral": ["</s>"], "magistral": ["</s>"], "cohere": [OVER],
    "always opened": [OVER],
    "harmony": ["<|return|>", "<|call|>"], "llama": ["<|eot_id|>", "<|eom_id|>"],
    "granite": ["<|end_of_text|>"], "phi4 mini": ["<|endoftext|>", "<|end|>"],
    "glm4": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "glm45": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "folded result": ["<eos>", "<end_of_turn>", "<start_function_response>"],
    "joined result": ["<|end|>"],
}  # fmt: skip


def prepared(tokenizer: Any, row: dict[str, Any], kind: Any = "sft") -> tuple[Any, Audit]:
    audit = Audit()
    row = {"id": "r0", "source": "s", **row}
    data = tokenize_rows(
        [row], tokenizer, kind=kind, max_length=10_000, truncation="drop", audit=audit
    )
    return data[0], audit


def whole(example: Any, number: int = 0) -> tuple[list[int], list[int]]:
    prompt = example["prompt_ids"]
    mask = [0] * len(prompt) + example["response_mask"][number]
    return prompt + example["response_ids"][number], mask


def last_start(mask: list[int]) -> int:
    return max(i for i in range(1, len(mask)) if mask[i] and not mask[i - 1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SHAPES)
def test_exactly_what_the_model_writes_is_trained(
    shaped: Callable[[str], Any], name: str, case: str
) -> None:
    tokenizer, chat = shaped(name), CASES[case]
    example, audit = prepared(tokenizer, {"messages": chat})
    ids, mask = whole(example)
    assert trained_texts(tokenizer, ids, mask) == TRAINED[name][case]
    differs = DIFFERS.get(name, set())
    # The prompts for sampling and training are equal, or the difference is reported.
    same = ids[: last_start(mask)] == encode_prompt(tokenizer, chat[:-1])
    assert same != (f"{case}*" in differs)
    assert ("text_left_out" in audit.warnings) == (case in LEFT_OUT.get(name, ()))
    found = audit.generation["s"].rows.count
    assert found == bool({case, f"{case}*"} & differs)
    if case == "system":
        assert "prompt_text_left_out" not in audit.warnings
        assert tokenizer.decode(ids).count("Be brief.") == 1


@pytest.mark.parametrize("name", SHAPES)
def test_the_last_turn_alone(shaped: Callable[[str], Any], name: str) -> None:
    """The response of a pair is trained as the last turn in SFT, and its end marker ends a response."""
    tokenizer = shaped(name)
    ends = end_token_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ends) == ENDS.get(name, ["<|im_end|>"])
    for case, chat in CASES.items():
        if chat[-1].get("tool_calls"):
            continue
        *prompt, last = chat
        fields = {k: v for k, v in last.items() if k not in ("role", "content")}
        row = {"prompt": prompt, "responses": [last["content"], "No."], "rewards": None}
        row["response_fields"] = [fields, {}]
        example, _ = prepared(tokenizer, row, "pair")
        ids, mask = whole(example)
        assert trained_texts(tokenizer, ids, mask) == TRAINED[name][case][-1:]
        assert ids[-1] in ends
