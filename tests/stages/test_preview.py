"""What is colored as trained is what the trainer trains; no part of a row is hidden."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from rpo_trainer.cli.commands import main
from rpo_trainer.data.token_view import LOST, PROMPT, TRAINED, pieces_of, visible
from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe import load_recipe
from rpo_trainer.stages.preview import preview
from tests.chain import tiny
from tests.raising import raises


def recipe(folder: Path, stage: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    made = tiny.tiny_recipe()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made["stages"] = [{"name": "one", "data": {"train": [{"path": "rows.jsonl"}]}, **stage}]
    return tiny.write_recipe(folder, made)


def shown(path: Path, count: int = 3, **settings: Any) -> list[Text]:
    return list(preview(load_recipe(path), count, **settings))


def styled(line: Text, *styles: str) -> str:
    """The text in any of these styles."""
    return "".join(line.plain[s.start : s.end] for s in line.spans if s.style in styles)


def plain(lines: list[Text]) -> str:
    return "\n".join(line.plain for line in lines)


PAIR = {
    "id": "p", "prompt": "add 1 and 2: ", "chosen": "3", "rejected": "41",
    "chosen_reward": 5.0, "rejected_reward": 0.5,
}  # fmt: skip


def test_the_response_is_trained_and_the_prompt_is_not(tmp_path: Path) -> None:
    path = recipe(tmp_path, {"kind": "dpo", "beta": 0.1}, [PAIR])
    lines = shown(path)
    (prompt,) = [line for line in lines[1:] if styled(line, PROMPT)]
    assert styled(prompt, PROMPT) == "⟦<s>⟧" + PAIR["prompt"]
    responses = [styled(line, *TRAINED) for line in lines[1:] if styled(line, *TRAINED)]
    assert [text[: len(wanted)] for text, wanted in zip(responses, ("3", "41"), strict=True)] == [
        "3",
        "41",
    ]
    assert all(len(text) > len(w) for text, w in zip(responses, ("3", "41"), strict=True))  # end
    text = plain(lines)
    assert "prompt of 14 tokens" in text
    assert "chosen response: 2 tokens, 2 trained, reward 5" in text
    assert "rejected response: 3 tokens, 3 trained, reward 0.5" in text


@pytest.mark.parametrize("colors", [True, False])
def test_special_tokens_look_other_than_their_letters(tmp_path: Path, colors: bool) -> None:
    row = {"prompt": "<s>a", "response": "b</s>"}
    path = recipe(tmp_path, {"kind": "sft"}, [row])
    said: dict[str, str] = {}
    for how in ("text", "parse"):
        given = [{"path": "rows.jsonl", "special_tokens": how}]
        made = tiny.tiny_recipe()
        made["stages"] = [{"name": "one", "kind": "sft", "data": {"train": given}}]
        path = tiny.write_recipe(tmp_path, made)
        lines = shown(path, colors=colors)
        assert "⟦special token⟧" in lines[0].plain  # the legend
        said[how] = plain(lines[1:])
    assert "⟦<s>⟧<s>a" in said["text"] and "b</s>⟦" in said["text"]
    assert "⟦<s>⟧a" in said["parse"] and "<s>⟦" not in said["parse"]
    assert said["parse"].count("⟦") == 2  # the begin and one end


def test_neighboring_tokens_differ_in_shade(tmp_path: Path) -> None:
    lines = shown(recipe(tmp_path, {"kind": "sft"}, [{"prompt": "a", "response": "bcd"}]))
    (line,) = [line for line in lines[1:] if styled(line, *TRAINED)]
    styles = [span.style for span in line.spans]
    assert len(styles) == 4 and all(
        a != b for a, b in itertools.pairwise(styles)
    )  # three letters, the end


@pytest.mark.parametrize("truncation", ["drop", "truncate"])
def test_what_is_beyond_max_length_is_shown_as_lost(tmp_path: Path, truncation: str) -> None:
    long = {"prompt": "abc", "response": "defghij"}
    path = recipe(tmp_path, {"kind": "sft", "max_length": 6, "truncation": truncation}, [long])
    lines = shown(path)
    (line,) = [line for line in lines[1:] if styled(line, LOST)]
    assert styled(line, *TRAINED) == "de" and styled(line, LOST).startswith("fghij")
    assert "6 beyond max_length" in plain(lines)
    assert ("dropped: longer than max_length" in plain(lines)) == (truncation == "drop")


def test_a_row_without_an_example_says_why(tmp_path: Path) -> None:
    same = {**PAIR, "rejected": PAIR["chosen"]}
    lines = shown(recipe(tmp_path, {"kind": "dpo", "beta": 0.1}, [same, PAIR]))
    assert "dropped: chosen is the same as rejected" in plain(lines)


def test_the_longest_row_is_always_there(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "b" * (9 if n == 7 else 1), "id": str(n)} for n in range(10)
    ]
    text = plain(shown(recipe(tmp_path, {"kind": "sft"}, rows), 2))
    assert [f"row {n}" in text for n in range(10)] == [n in (0, 5, 7) for n in range(10)]
    assert "row 7 (the longest)" in text


def test_of_a_long_text_both_ends_are_shown(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b" + "c" * 1000 + "d"}]
    text = plain(shown(recipe(tmp_path, {"kind": "sft", "max_length": 2000}, rows)))
    assert "… 603 tokens …" in text and "bccc" in text and "cccd" in text


def test_a_stage_that_samples_shows_its_prompts_and_rounds_are_shown_once(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path, tiny.tiny_recipe())
    text = plain(shown(path, 1))
    assert "48 prompts; responses are sampled when the stage runs" in text
    assert "rpo-2 (rpo)\nsame data as rpo-1" in text
    assert "code (sft)" in text


def test_without_colors_the_marks_are_in_the_text(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, {"kind": "sft", "max_length": 6}, [{"prompt": "abc", "response": "defg"}]
    )
    text = plain(shown(path, colors=False))
    assert "abc" in text and "[de]⟨fg" in text


def test_a_character_of_several_tokens_is_one_piece() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )  # fmt: skip
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    text = "né 語😀!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    pieces = pieces_of(tokenizer, ids, 0, len(ids))
    assert [piece for _, piece in pieces] == list(text)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert visible("a\x1b[31m\nb\x00\u202e\x7f") == "a␛[31m↵\nb␀\\u202e␡"


def test_joiners_of_emoji_stay() -> None:
    assert visible("👩\u200d🔬") == "👩\u200d🔬"


def test_an_unknown_stage_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path, tiny.tiny_recipe())
    with raises("option.unknown-stage", RecipeError, where=str(path)) as error:
        shown(path, stage="rpo")
    assert "'rpo'" in error.value.what
    assert error.value.fix and error.value.fix.endswith(", ".join(tiny.STAGES))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, {"kind": "dpo", "beta": 0.1}, [PAIR])
    with pytest.raises(SystemExit) as end:
        main(["preview", str(path), "-n", "1", "--stage", "one"])
    assert end.value.code == 0
    assert "[41" in capsys.readouterr().out
