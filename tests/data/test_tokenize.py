from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from rpo_trainer.data import Audit, tokenize_rows
from rpo_trainer.errors import DataError
from tests.raising import raises

from .conftest import trained_texts

USER = {"role": "user", "content": "Hi, who are you?"}


def tokenized(rows: list[Any], tokenizer: Any, kind: str, **options: Any) -> tuple[Any, Audit]:
    audit = Audit()
    fields = {"max_length": 200, "truncation": "drop", **options}
    return tokenize_rows(rows, tokenizer, kind=kind, audit=audit, **fields), audit


def pair(i: int, *responses: str, prompt: Any = None, rewards: Any = None) -> dict[str, Any]:
    return {
        "id": f"r{i}",
        "source": "s",
        "prompt": [USER] if prompt is None else prompt,
        "responses": list(responses),
        "rewards": rewards,
    }


def sft(i: int, *turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"id": f"r{i}", "source": "s", "messages": messages}


def test_columns_and_types(chatml: Any) -> None:
    data, _ = tokenized([pair(0, "yes", "no", rewards=[1, 0]), pair(1, "a", "b")], chatml, "pair")
    assert data.column_names == [
        "id",
        "source",
        "prompt_ids",
        "response_ids",
        "response_mask",
        "rewards",
    ]
    assert str(data.data.schema.field("response_ids").type).count("int32") == 1
    assert data[0]["rewards"] == [1.0, 0.0]
    assert data[1]["rewards"] is None


def test_prompt_is_stored_once_before_its_responses(chatml: Any) -> None:
    data, audit = tokenized([pair(0, "Yes, I am", "Yes, it is", "No")], chatml, "pair")
    example = data[0]
    text = "<|im_start|>user\nHi, who are you?<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.decode(example["prompt_ids"]) == text  # without "Yes", which is trained
    responses = [chatml.decode(ids) for ids in example["response_ids"]]
    assert responses == ["Yes, I am<|im_end|>", "Yes, it is<|im_end|>", "No<|im_end|>"]
    assert all(all(mask) for mask in example["response_mask"])
    assert audit.kept == {"s": 1}


def test_sft_trains_every_turn_and_nothing_between(chatml: Any) -> None:
    data, _ = tokenized([sft(0, "one", "two", "three", "four", "five")], chatml, "sft")
    example = data[0]
    (ids,), (mask,) = example["response_ids"], example["response_mask"]
    assert trained_texts(chatml, ids, mask) == ["two<|im_end|>", "four<|im_end|>"]
    assert mask[-1] == 1  # tokens after the last trained one are removed
    assert chatml.decode(example["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_plain_rows(plain_text: Any) -> None:
    rows = [{"id": "a", "source": "s", "prompt": "2 + 3 = ", "response": "5"}]
    data, _ = tokenized(rows, plain_text, "sft")
    whole = data[0]["prompt_ids"] + data[0]["response_ids"][0]
    assert plain_text.decode(whole) == "<s>2 + 3 = 5</s>"
    assert data[0]["prompt_ids"][0] == plain_text.bos_token_id
    both, _ = tokenized([pair(0, "5", "6", prompt="2 + 3 = ")], plain_text, "pair")
    assert both[0]["prompt_ids"] == data[0]["prompt_ids"]


def test_drops_by_reason(chatml: Any) -> None:
    rows = [
        pair(0, "yes", "no"),
        pair(1, "yes", " \n"),
        pair(2, "", "no"),
        pair(3, "same", "same"),
        pair(4, "word " * 100, "short"),
        pair(5, "a", "b", prompt=[{"role": "user", "content": "word " * 200}]),
    ]
    data, audit = tokenized(rows, chatml, "pair", max_length=60)
    assert data["id"][:] == ["r0"]
    assert {reason: count.examples for reason, count in audit.dropped.items()} == {
        "empty_response": ["r1", "r2"],
        "identical_responses": ["r3"],
        "too_long": ["r4"],
        "prompt_too_long": ["r5"],
    }
    rows = [sft(0, "q", "a"), sft(1, "q", " "), sft(2, "q", "a", "q", ""), sft(3, "q " * 99, "a")]
    data, audit = tokenized(rows, chatml, "sft", max_length=60)
    assert data["id"][:] == ["r0"]
    assert audit.dropped["empty_response"].examples == ["r1", "r2"]
    assert audit.dropped["prompt_too_long"].examples == ["r3"]


def test_truncated_responses_do_not_train_an_end_token(chatml: Any) -> None:
    end = chatml.eos_token_id
    rows = [pair(0, "a " * 80, "b"), pair(1, "cat " * 80, "cat " * 90), pair(2, "a", "b")]
    data, audit = tokenized(rows, chatml, "pair", max_length=50, truncation="truncate")
    assert data["id"][:] == ["r0", "r2"]
    long, short = data[0]["response_ids"]
    assert len(data[0]["prompt_ids"]) + len(long) == 50
    assert end not in long
    assert short[-1] == end
    assert audit.warnings["truncated"].examples == ["r0", "r1"]
    # equal after truncation
    assert audit.dropped["identical_after_truncation"].examples == ["r1"]


def test_truncated_sft_row_ends_with_a_trained_token(chatml: Any) -> None:
    row = sft(0, "one", "two", "a long question " * 20, "never seen")
    data, _ = tokenized([row], chatml, "sft", max_length=40, truncation="truncate")
    (ids,), (mask,) = data[0]["response_ids"], data[0]["response_mask"]
    assert trained_texts(chatml, ids, mask) == ["two<|im_end|>"]
    assert mask[-1] == 1


def test_white_space_that_a_template_trims_makes_no_difference(
    make_tokenizer: Callable[..., Any],
) -> None:
    from rpo_trainer.data import set_chat_template

    tokenizer = set_chat_template(make_tokenizer(["</s>"], eos="</s>"), "plain")
    rows = [pair(0, "yes", "yes\n"), pair(1, "yes", "no")]
    _, audit = tokenized(rows, tokenizer, "pair")
    assert audit.dropped["identical_after_truncation"].examples == ["r0"]


def test_repeated_and_blank_responses_leave_the_row(chatml: Any) -> None:
    rows = [
        pair(0, "a", "b", "a", "c", rewards=[4, 3, 2, 1]),
        pair(1, "a", " ", "c", rewards=[3, 2, 1]),
        pair(2, "a", "a", "a", rewards=[3, 2, 1]),
        pair(3, "a", "", " ", rewards=[3, 2, 1]),
    ]
    data, audit = tokenized(rows, chatml, "pair")
    assert data["rewards"][:] == [[4, 3, 1], [3, 1]]
    assert [len(ids) for ids in data["response_ids"]] == [3, 2]
    assert audit.warnings["duplicate_responses_removed"].examples == ["r0"]
    assert audit.warnings["blank_responses_removed"].examples == ["r1"]
    assert audit.dropped["identical_responses"].examples == ["r2"]
    assert audit.dropped["empty_response"].examples == ["r3"]


def test_no_prompt_and_no_begin_token(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(["</s>"], eos="</s>")
    rows = [{"id": "a", "source": "s", "prompt": "", "response": "The cat sat"}]
    data, _ = tokenized(rows, tokenizer, "sft")
    assert len(data[0]["prompt_ids"]) == 1
    whole = data[0]["prompt_ids"] + data[0]["response_ids"][0]
    assert tokenizer.decode(whole) == "The cat sat</s>"
    rows = [pair(0, "The cat", "The mat", prompt=""), pair(1, "yes", "no", prompt="")]
    data, audit = tokenized(rows, tokenizer, "pair")
    assert data["id"][:] == ["r0"]
    assert audit.dropped["no_prompt_tokens"].examples == ["r1"]


def test_special_token_text_is_text_and_counted(chatml: Any) -> None:
    rows = [pair(0, "a<|im_end|>b", "c"), pair(1, "a", "b")]
    data, audit = tokenized(rows, chatml, "pair")
    assert audit.warnings["special_token_text"].examples == ["r0"]
    first, second = data[0]["response_ids"]
    assert first.count(chatml.eos_token_id) == second.count(chatml.eos_token_id) == 1
    assert data[0]["prompt_ids"] == data[1]["prompt_ids"]  # tokenized equally in both ways


def test_tools_that_the_template_ignores(make_tokenizer: Callable[..., Any]) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    tokenizer = make_tokenizer(["</s>"], eos="</s>", chat_template=template)
    row = {**sft(0, "q", "a"), "tools": [{"type": "function", "function": {"name": "f"}}]}
    _, audit = tokenized([row, sft(1, "q", "a")], tokenizer, "sft")
    assert audit.warnings["tools_not_rendered"].examples == ["r0"]


def test_rows_the_template_refuses_come_together(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    )
    tokenizer = make_tokenizer(["</s>"], eos="</s>", chat_template=template)
    bad = sft(1, "q", "a")
    bad["messages"] = [{"role": "system", "content": "x"}, *bad["messages"]]
    with raises("template.refuses-row", DataError, rows=["r1", "r1"], of=3) as error:
        tokenized([sft(0, "q", "a"), bad, bad], tokenizer, "sft")
    assert "(no system)" in error.value.what


def test_nothing_left(chatml: Any) -> None:
    with raises("data.no-rows-left", DataError) as error:
        tokenized([pair(0, "a", "a")], chatml, "pair")
    assert "(r0)" in str(error.value.why)
    assert "temperature" in str(error.value.fix)
    with raises("data.no-rows-left", DataError) as error:
        tokenized([pair(0, "a", "b" * 999)], chatml, "pair", max_length=8)
    assert "temperature" not in str(error.value)
    assert "max_length: median 10" in str(error.value.why)
    assert "max_length (8)" in str(error.value.fix)


def test_lengths_of_what_is_too_long(chatml: Any) -> None:
    rows = [pair(0, "a", "b"), pair(1, "a", "b" * 100), pair(2, "a" * 200, "b")]
    _, audit = tokenized(rows, chatml, "pair", max_length=60)
    whole, everything = tokenized(rows, chatml, "pair", max_length=999)
    longest = [
        len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in whole.to_list()[1:]
    ]
    assert audit.lengths()["too long"]["min"] == min(longest)
    assert audit.lengths()["too long"]["max"] == max(longest)
    assert "too long" not in everything.lengths()


def test_more_than_one_batch_keeps_the_order(chatml: Any, monkeypatch: Any) -> None:
    import rpo_trainer.data.tokenize as module

    rows = [sft(i, f"question {i}", f"answer {i}") for i in range(7)]
    whole, _ = tokenized(rows, chatml, "sft")
    monkeypatch.setattr(module, "BATCH", 3)
    parts, _ = tokenized(rows, chatml, "sft")
    assert parts.to_list() == whole.to_list()
    assert parts["id"][:] == [f"r{i}" for i in range(7)]


def test_unusual_characters(chatml: Any) -> None:
    text = "🙂 e\u0301 שלום \x00 👩‍👩‍👧"
    data, _ = tokenized([sft(0, text, text)], chatml, "sft")
    (ids,), (mask,) = data[0]["response_ids"], data[0]["response_mask"]
    assert trained_texts(chatml, ids, mask) == [text + "<|im_end|>"]


def test_importing_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, rpo_trainer.data\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
