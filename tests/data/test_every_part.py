"""Every field of a row is rendered, reported as not read, or refused by name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pytest

from rpo_trainer.data import Audit, encode_prompt, prepare_dataset
from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.conversation import PROMPT_COLUMNS
from rpo_trainer.data.formats import COMMON, FORMATS, PROMPT_FORMATS
from rpo_trainer.data.messages import ROLE_NAMES
from rpo_trainer.data.sources import RawSource
from rpo_trainer.data.tokenize import audit_prompts, tokenize_rows
from rpo_trainer.errors import DataError, Problems
from tests.data.test_adapt_rows import PAIRS, SFT
from tests.data.test_any_row import OTHERS
from tests.raising import raises

Row = dict[str, Any]
MARK = "Marker"
KEYS = (
    "name", "reasoning_content", "thinking", "reasoning", "tool_calls", "tool_call_id", "weight",
    "train", "loss", "prefix", "images", "audio", "function_call", "tools", "unheard_of",
)  # fmt: skip
COLUMNS = (
    "system", "tools", "history", "input", "instruction", "question", "context", "messages",
    "conversations", "trajectory", "images", "weight", "label", "system_prompt", "notes", "id",
    "source", "ground_truth", "chat_template_kwargs",
)  # fmt: skip
TALK = [{"role": "user", "content": MARK}]
TOOLS = [{"type": "function", "function": {"name": MARK, "parameters": {}}}]
CALLS = [{"id": "1", "type": "function", "function": {"name": MARK, "arguments": {"a": MARK}}}]
# Valid values for some names; others get a text.
VALUES: dict[str, Any] = {
    "tools": TOOLS, "tool_calls": CALLS, "function_call": CALLS[0]["function"], "weight": 0,
    "train": False, "loss": False, "prefix": True, "images": [MARK], "audio": MARK,
    "history": [[MARK, MARK]], "messages": TALK, "conversations": TALK, "trajectory": TALK,
    "label": True, "chat_template_kwargs": {"mode": MARK},
}  # fmt: skip
# Read, but not as text: tested elsewhere.
READ_AS_VALUES = {
    "pair": ("id", "ground_truth", "truth_chosen", "chosen_reward", "rejected_reward", "ranks"),
    "prompt": ("id", "ground_truth"),
    "sft": ("id",),
    "rating": ("id",),
}
LAYOUTS: list[tuple[str, str, Row]] = [
    *((FORMATS[c.split(",")[0].split()[0]].kind, c, row) for c, (row, _) in SFT.items()),
    *((FORMATS[c.split(",")[0].split()[0]].kind, c, row) for c, (row, _) in PAIRS.items()),
    *((FORMATS[name].kind, name, row) for name, row in OTHERS.items()),
    ("pair", "pairs of an instruction", {"instruction": "q", "input": "i", "chosen": "x", "rejected": "y"}),
    ("pair", "pairs of messages", {"messages": TALK, "chosen": "x", "rejected": "y"}),
    ("pair", "pairs of a trajectory", {"trajectory": TALK, "chosen": "x", "rejected": "y"}),
    ("prompt", "prompt", {"prompt": [{"role": "user", "content": "q"}]}),
    ("prompt", "prompt of text", {"prompt": "q"}),
    ("prompt", "messages", {"messages": [{"role": "user", "content": "q"}]}),
    ("prompt", "sharegpt", {"conversations": [{"from": "human", "value": "q"}]}),
    ("prompt", "alpaca", {"instruction": "q", "input": "more"}),
]  # fmt: skip


def name_of(kind: str, case: str) -> str | None:
    """The format if it is selected only by name."""
    found = case.split(",")[0].split()[0]
    return found if found in ("orca", "margin", "helpsteer2_pairs") else None


def outcome(row: Row, kind: Any, case: str, tokenizer: Any, arrow: bool) -> tuple[str, list[Any]]:
    """The text of the tokens, and the messages: (level, text)."""
    audit = Audit()
    rows = [{**copy.deepcopy(row), "id": "a"}, {**copy.deepcopy(row), "id": "b"}]
    if case == "helpsteer2_pairs":  # consecutive rows with the same prompt are a pair
        rows[1]["response"] = "another"
    if arrow:
        # Structs in an Arrow column have all keys; JSON objects have their own.
        rows = pa.Table.from_pylist(rows).to_pylist()
    raw = RawSource("src", rows, list(range(len(rows))), "file", arrow)
    options = {"kind": kind, "format": name_of(kind, case), "audit": audit}
    found = adapt(raw, **options)
    if kind == "prompt":
        audit_prompts(found, tokenizer, audit, refuse_special_text=True)
        ids = [encode_prompt(tokenizer, one["prompt"], one.get("tools")) for one in found]
        return "".join(map(tokenizer.decode, ids)), audit.messages()
    if kind == "rating":
        found = [{**one, "attributes": [1.0]} for one in found]
    data = tokenize_rows(
        found, tokenizer, kind=kind, max_length=10_000, truncation="drop", audit=audit
    )
    texts = [
        tokenizer.decode(part)
        for example in data
        for part in (example["prompt_ids"], *example["response_ids"])
    ]
    return "".join(texts), audit.messages()


def accounted_for(name: str, row: Row, kind: Any, case: str, tokenizer: Any, arrow: bool) -> str:
    """What happened to the field of a row with this name, or that contains the marker."""
    try:
        text, said = outcome(row, kind, case, tokenizer, arrow)
    except (DataError, Problems) as error:
        refusal = str(error)
        text, said = "", []
    else:
        refusal = ""
    if refusal:
        assert name in refusal, refusal
        return "refused"
    if MARK in text:
        return "written"
    levels = [level for level, line in said if name in line]
    assert levels, (name, said)
    return "warned of" if max(levels) >= logging.WARNING else "told"


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    from rpo_trainer.data import set_chat_template

    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    return set_chat_template(make_tokenizer(specials, eos="<|im_end|>"), "chatml")


@pytest.mark.parametrize("arrow", [False, True], ids=["JSON", "Arrow"])
@pytest.mark.parametrize(("kind", "case", "row"), LAYOUTS, ids=[f"{k}: {c}" for k, c, _ in LAYOUTS])
def test_every_column(kind: str, case: str, row: Row, arrow: bool, tokenizer: Any) -> None:
    table = PROMPT_FORMATS if kind == "prompt" else FORMATS
    known = {c for format in table.values() for c in (*format.required, *format.optional)}
    for column in sorted({*COLUMNS, *COMMON, *PROMPT_COLUMNS, "stray"} | known):
        if column in row or column in READ_AS_VALUES.get(kind, ()):
            continue
        added = {**row, column: VALUES.get(column, MARK)}
        found = accounted_for(column, added, kind, case, tokenizer, arrow)
        quiet = ("source", "ground_truth", "truth_chosen")
        assert found != "told" or column in quiet or kind == "prompt", (column, found)
        if column == "system" and case != "text":
            assert found == "written", (column, found)


def messages_in(row: Row) -> Iterator[tuple[str, list[Row]]]:
    """Every list of messages in a row, with its column."""
    for column, value in row.items():
        if isinstance(value, dict) and ("role" in value or "from" in value):
            yield column, [value]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            if "completion" in value[0]:
                yield column, value[0]["completion"]
            elif "role" in value[0] or "from" in value[0]:
                yield column, value


TALKS = [(kind, case, row) for kind, case, row in LAYOUTS if any(messages_in(row))]


@pytest.mark.parametrize("arrow", [False, True], ids=["JSON", "Arrow"])
@pytest.mark.parametrize(("kind", "case", "row"), TALKS, ids=[f"{k}: {c}" for k, c, _ in TALKS])
def test_every_key_of_messages(kind: str, case: str, row: Row, arrow: bool, tokenizer: Any) -> None:
    for column, talk in messages_in(row):
        for place, message in enumerate(talk):
            for key in KEYS:
                changed = copy.deepcopy(row)
                (own,) = (found for name, found in messages_in(changed) if name == column)
                own[place][key] = VALUES.get(key, MARK)
                role = ROLE_NAMES[str(message.get("role", message.get("from"))).lower()]
                if key in ("weight", "train", "loss"):
                    if role == "assistant":
                        continue  # tested by name below
                    own[place][key] = True
                if kind == "prompt" and role == "assistant":
                    continue
                if case.startswith("ultrafeedback") and column == "messages":
                    continue
                # The common part of `chosen` and `rejected` is the prompt.
                for other in ("chosen", "rejected"):
                    if column in ("chosen", "rejected") and place < len(talk) - 1:
                        changed[other][place] = copy.deepcopy(own[place])
                found = accounted_for(key, changed, kind, case, tokenizer, arrow)
                assert found != "told", (column, place, key)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("arrow", [False, True])
def test_thinking_of_responses_is_trained(
    key: str, arrow: bool, make_tokenizer: Callable[..., Any]
) -> None:
    """Under each name, and in each layout of preferences."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>", chat_template=template
    )
    one = {"role": "assistant", "content": "same", key: "good thought"}
    two = {"role": "assistant", "content": "same", key: "bad thought"}
    bare = {"role": "assistant", "content": "other"}
    prompt = [{"role": "user", "content": "q"}]
    layouts: list[Row] = [
        {"prompt": prompt, "chosen": [one], "rejected": [two]},
        {"prompt": "q", "chosen": [one], "rejected": [two]},
        {"chosen": [*prompt, one], "rejected": [*prompt, two]},
        {"prompt": prompt, "responses": [[two], [one], [bare]], "rewards": [1.0, 3.0, 0.0]},
        {"prompt": prompt, "responses": [[two], [one], [bare]], "ranks": [1, 0, 2]},
        {"context": prompt, "completions": [
            {"rank": 1, "completion": [two]}, {"rank": 0, "completion": [one]},
        ]},
    ]  # fmt: skip
    for row in layouts:
        rows: Any = datasets.Dataset.from_list([row]) if arrow else [row]
        audit = Audit()
        data = prepare_dataset(rows, tokenizer, kind="pair", max_length=500, audit=audit)
        best, worse, *rest = (tokenizer.decode(ids) for ids in data[0]["response_ids"])
        assert best == "<think>good thought</think>same<|im_end|>"
        assert worse == "<think>bad thought</think>same<|im_end|>"
        assert rest in ([], ["other<|im_end|>"])
        assert not audit.warnings


def test_two_thoughts_of_one_turn_are_refused(tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "a", "thinking": "x", "reasoning": "y"}
    row = {"messages": [{"role": "user", "content": "q"}, answer]}
    with raises("data.conflicting-thinking", DataError) as error:
        prepare_dataset([row], tokenizer, kind="sft", max_length=100)
    assert "`thinking` and `reasoning`" in error.value.what


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_flags_of_turns(key: str, tokenizer: Any) -> None:
    """They apply in SFT, and are refused if the turn is a chosen or rejected response."""
    user, first, last = (
        {"role": r, "content": c}
        for r, c in (("user", "q"), ("assistant", "first"), ("assistant", "last"))
    )
    talk = [user, {**first, key: False}, user, {**last, key: True}]
    data = prepare_dataset([{"messages": talk}], tokenizer, kind="sft", max_length=200)
    (ids,), (mask,) = data[0]["response_ids"], data[0]["response_mask"]
    trained = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert trained == "last<|im_end|>"
    pair = {"prompt": [user], "chosen": [{**first, key: 0}], "rejected": [last]}
    with raises("data.untrained-response", DataError):
        prepare_dataset([pair], tokenizer, kind="pair", max_length=200)
    for wrong in (0.5, "false", [0]):
        talk[1][key] = wrong
        with raises("data.bad-train-flag", DataError) as error:
            prepare_dataset([{"messages": talk}], tokenizer, kind="sft", max_length=200)
        assert f"`{key}` of a message in `messages`" in error.value.what


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        ([{"type": "text", "text": "one", "image_url": None}], "one"),
    ],
)
def test_content_in_parts(parts: list[Row], text: str, tokenizer: Any) -> None:
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    data = prepare_dataset([{"messages": talk}], tokenizer, kind="sft", max_length=200)
    assert tokenizer.decode(data[0]["response_ids"][0]) == f"{text}<|im_end|>"
    assert text in tokenizer.decode(data[0]["prompt_ids"])


def test_parts_that_are_not_text_are_refused(tokenizer: Any) -> None:
    for part, code, named in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "data.not-text", "'image_url'"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "data.not-text", "'input_audio'"),
        ({"type": "text", "text": "a", "annotations": ["b"]}, "data.unread-part", "`annotations`"),
    ):
        talk = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]
        with raises(code, DataError) as error:
            prepare_dataset([{"messages": talk}], tokenizer, kind="sft", max_length=200)
        assert named in error.value.what


def test_two_system_prompts_are_refused(tokenizer: Any) -> None:
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "q"}]
    same = {"prompt": talk, "chosen": "x", "rejected": "y", "system": " Be  short.\n"}
    (row,) = prepare_dataset([same], tokenizer, kind="pair", max_length=200)
    assert tokenizer.decode(row["prompt_ids"]).count("Be short.") == 1
    with raises("data.conflicting-system", DataError):
        prepare_dataset([{**same, "system": "Be long."}], tokenizer, kind="pair", max_length=200)


def test_arrow_adds_no_null_arguments(tokenizer: Any) -> None:
    """In an Arrow table every call has the arguments of all calls."""

    def talk(**arguments: Any) -> Row:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "q"}, answer]}

    rows = [talk(a="x"), talk(b="y")]
    texts = [
        [tokenizer.decode(one["response_ids"][0]) for one in data]
        for data in (
            prepare_dataset(given, tokenizer, kind="sft", max_length=500)
            for given in (rows, datasets.Dataset.from_list(rows))
        )
    ]
    assert texts[0] == texts[1]
    assert "null" not in "".join(texts[1])


def test_tools_next_to_plain_text_are_counted(tokenizer: Any) -> None:
    audit = Audit()
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "tools": TOOLS}
    prepare_dataset([row], tokenizer, kind="pair", max_length=200, audit=audit)
    assert audit.warnings["tools_not_rendered"].count == 1


def test_calls_of_a_prompt_that_the_template_drops_are_refused(
    make_tokenizer: Callable[..., Any],
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    tokenizer = make_tokenizer(["</s>"], eos="</s>", chat_template=template)
    calling = {"role": "assistant", "content": "", "tool_calls": CALLS}
    talk = [{"role": "user", "content": "q"}, calling, {"role": "tool", "content": "4"}]
    with raises("template.unwritten-tool-calls", DataError):
        prepare_dataset(
            [{"prompt": talk, "chosen": "x", "rejected": "y"}],
            tokenizer, kind="pair", max_length=200,
        )  # fmt: skip
