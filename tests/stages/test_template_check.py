"""`check --template` shows seven conversations as they are trained, and exits with 5 if one is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.cli.commands import main
from rpo_trainer.data import Audit
from rpo_trainer.data.sample_conversations import SAMPLES
from rpo_trainer.data.tokenize import tokenize_rows
from rpo_trainer.stages.template_check import check_samples, load_checked
from tests.data.conftest import CHATML_SPECIALS, make_tokenizer  # noqa: F401

Json = list[dict[str, Any]]
# Thinking, calls and results; `quiet` omits the thinking from the generation prompt and the text.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not quiet %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think>' if open }}{% endif %}"
)


@pytest.fixture
def save(make_tokenizer: Any, tmp_path: Path) -> Any:  # noqa: F811
    """Saves a tokenizer with this template and returns its directory."""

    def saved(template: str | None) -> str:
        tokenizer = make_tokenizer(CHATML_SPECIALS, eos="<|im_end|>", chat_template=template)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return str(tmp_path / "tokenizer")

    return saved


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["check", "--template", *words])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_what_is_trained_is_what_the_trainer_trains(save: Any, capsys: Any) -> None:
    folder = save(TEMPLATE)
    code, out, _ = run(capsys, folder, "--json")
    found: Json = json.loads(out)["conversations"]
    assert code == 0 and [one["name"] for one in found] == [sample.name for sample in SAMPLES]
    assert {one["status"] for one in found} == {"right"} and len(found) == 7
    assert all(one["follows_generation_prompt"] for one in found)
    by = {one["name"]: one["trained"] for one in found}
    assert by["several turns"] == [
        "<think></think>The Rhine.<|im_end|>", "<think></think>Lake Geneva.<|im_end|>",
        "<think></think>You are welcome.<|im_end|>",
    ]  # fmt: skip
    assert by["thinking"] == ["<think>17 times 3 is 30 plus 21.</think>51<|im_end|>"]
    called, answered, between = [sample.name for sample in SAMPLES if "tool" in sample.name]
    (call,) = by[called]
    assert '"city": "Oslo"' in call and call.endswith("</call><|im_end|>")
    assert len(by[answered]) == 2
    assert len(by[between]) == 3
    assert not any("degrees" in text for text in by[between][:2])
    tokenizer = load_checked(folder, None, None)
    for sample, one in zip(SAMPLES, check_samples(tokenizer), strict=True):
        (example,) = tokenize_rows(
            [sample.row()],
            tokenizer,
            kind="sft",
            max_length=10**6,
            truncation="drop",
            audit=Audit(),
        )
        assert one.ids == [*example["prompt_ids"], *example["response_ids"][0]]
        assert one.mask == [0] * len(example["prompt_ids"]) + example["response_mask"][0]


def test_the_page_marks_what_is_trained(save: Any, capsys: Any) -> None:
    code, out, _ = run(capsys, save(TEMPLATE))
    assert code == 0
    assert "[<think></think>Five.⟦<|im_end|>⟧]" in out
    heads = [line for line in out.splitlines() if ": right, " in line]
    assert len(heads) == 7 == out.count(" follows ")
    legend = out.splitlines()[0]
    assert "[trained]" in legend and "max_length" not in legend and "response" not in legend


# The generation prompt opens the thinking, but in the text only the last turn has it.
CLOSED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, CLOSED])
def test_wrong_is_what_training_warns_about(template: str, save: Any, capsys: Any) -> None:
    code, out, _ = run(capsys, save(template), "--json")
    status = {one["name"]: one["status"] for one in json.loads(out)["conversations"]}
    assert (code == 5) == (template == CLOSED) == (status["several turns"] == "wrong")
    assert status["plain"] == "right"
    tokenizer = load_checked(save(template), None, None)
    for sample in SAMPLES:
        if status[sample.name] != "not supported":
            audit = Audit()
            tokenize_rows(
                [sample.row()], tokenizer, kind="sft", max_length=10**6, truncation="drop", audit=audit
            )  # fmt: skip
            warned = any("generation" in text for _, text in audit.messages())
            assert warned == (status[sample.name] == "wrong")


def test_a_template_that_takes_arguments_as_text(save: Any, capsys: Any) -> None:
    text = TEMPLATE.replace("c.function | tojson", "c.function.name + c.function.arguments")
    code, out, _ = run(capsys, save(text), "--json")
    found: Json = json.loads(out)["conversations"]
    assert code == 0 and {one["status"] for one in found} == {"right"}
    assert '"city": "Oslo"' in found[4]["trained"][0]


def test_variables_change_what_is_shown(save: Any, capsys: Any) -> None:
    folder = save(TEMPLATE)
    code, out, _ = run(capsys, folder, "--kwargs", "quiet=true", "--json")
    found: Json = json.loads(out)["conversations"]
    assert code == 0 and "<think>" not in out
    left_out = [one["name"] for one in found if any("omits" in w for w in one["warnings"])]
    assert left_out == [sample.name for sample in SAMPLES if "thinking" in sample.name]
    code, _, err = run(capsys, folder, "--kwargs", "enable_thinking=true")
    assert code == 2 and "`quiet`" in err and "--kwargs.enable_thinking: " in err
    code, _, err = run(capsys, folder, "--kwargs", "tools=1")
    assert code == 2 and "tools" in err


def test_a_generation_prompt_that_training_does_not_have(save: Any, capsys: Any) -> None:
    words = (save(TEMPLATE), "--kwargs", "open=true", "--kwargs", "quiet=true")
    code, out, err = run(capsys, *words, "--json")
    found: Json = json.loads(out)["conversations"]
    assert code == 5 and "[template.wrong-conversations]" in err and "7 of 7" in err
    assert all(one["status"] == "wrong" and not one["follows_generation_prompt"] for one in found)
    assert "<think>" in found[0]["reasons"][0]
    assert run(capsys, *words)[0] == 5


def test_what_a_template_does_not_support_is_not_wrong(save: Any, capsys: Any) -> None:
    strict = (
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
        "{{ raise_exception('only two roles') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    code, out, _ = run(capsys, save(strict), "--json")
    found: Json = json.loads(out)["conversations"]
    by = {one["name"]: one for one in found}
    assert code == 0 and by["plain"]["status"] == by["thinking"]["status"] == "right"
    assert "only two roles" in by["system"]["reasons"][0]
    calls = [one["status"] for one in found if "tool" in one["name"]]
    assert calls == ["not supported"] * 3
    code, out, _ = run(capsys, save(strict), "--chat-template", "chatml")
    assert code == 0 and "system: right" in out


def test_turns_that_cannot_be_found_are_wrong(save: Any, capsys: Any) -> None:
    shouting = "{% for m in messages %}{{ m.content | upper }} {% endfor %}"
    code, out, _ = run(capsys, save(shouting), "--json")
    (plain, *_) = json.loads(out)["conversations"]
    assert code == 5 and plain["status"] == "wrong" and plain["reasons"] and not plain["tokens"]


@pytest.mark.parametrize(
    "words",
    [[], ["r.yaml", "--kwargs", "a=1"], ["r.yaml", "--template", "t"]],
    ids=str,
)
def test_options_that_do_not_go_together(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main(["check", *words])
    assert end.value.code == 2 and "--template" in capsys.readouterr().err


def test_a_tokenizer_without_a_template(save: Any, capsys: Any) -> None:
    code, _, err = run(capsys, save(None))
    assert code == 2 and "[template.missing]" in err


def test_a_template_that_writes_words_after_the_result_of_their_call(
    save: Any, capsys: Any
) -> None:
    late = (
        "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n{{ m.content }}<|im_end|>\n"
        "{% set before = messages[loop.index0 - 1] %}{{ before.content if before.tool_calls }}"
        "{% else %}<|im_start|>{{ m.role }}\n"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        "{{ m.content if not m.tool_calls }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    code, out, _ = run(capsys, save(late), "--json")
    status = {one["name"]: one["status"] for one in json.loads(out)["conversations"]}
    assert code == 0
    assert [name for name, one in status.items() if one == "not supported"] == [
        "tool call with text, result and answer"
    ]
