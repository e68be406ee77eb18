"""What is colored as trained is what the trainer trains; no part of a row is hidden."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from rpo_trainer.cli.commands import main
from rpo_trainer.data import json_file
from rpo_trainer.data.token_view import LOST, PROMPT, TRAINED, pieces_of, visible
from rpo_trainer.errors import DataError, RecipeError
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


def many(folder: Path, rows: int, text: str = "b") -> Path:
    made = [{"prompt": f"{n}", "response": text, "id": f"r{n}"} for n in range(rows)]
    made[-1]["response"] = 2 * text
    return recipe(folder, {"kind": "sft", "max_length": 10_000}, made)


def test_only_the_first_rows_of_a_large_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many(tmp_path, 50_000)
    parsed = []
    parse = json_file.parse
    monkeypatch.setattr(json_file, "parse", lambda *a, **k: parsed.append(1) or parse(*a, **k))
    text = plain(shown(path, 2))
    assert len(parsed) <= 101  # 0.2 % of the rows
    assert "rows from the first 100 of each source, max_length" in text
    assert "50,000" not in text and "the longest" in text
    assert [row for row in ("r0", "r50", "r49999") if f"row {row}" in text] == ["r0", "r50"]
    parsed.clear()
    text = plain(shown(path, 2, every_row=True))
    assert "50,000 rows, max_length" in text and "row r49999 (the longest)" in text
    assert len(parsed) == 50_000


def test_a_preview_needs_little_memory(tmp_path: Path) -> None:
    path = many(tmp_path, 20_000, "b" * 1_000)
    size = (tmp_path / "rows.jsonl").stat().st_size
    plain(shown(path, 2))  # imports
    tracemalloc.start()
    plain(shown(path, 2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4


def test_more_examples_than_the_first_rows_read_as_many(tmp_path: Path) -> None:
    path = many(tmp_path, 200)
    text = plain(shown(path, 150))
    assert sum(f"row r{n}:" in text for n in range(200)) == 150
    assert "rows from the first 150 of each source" in text
    assert "200 rows, max_length" in plain(shown(path, 200))


def test_every_source_is_among_the_first_rows(tmp_path: Path) -> None:
    many(tmp_path, 300)
    other = [{"prompt": f"{n}", "response": "c", "id": f"s{n}"} for n in range(300)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    made = tiny.tiny_recipe()
    train = [{"path": "rows.jsonl"}, {"path": "other.jsonl"}]
    made["stages"] = [{"name": "one", "kind": "sft", "data": {"train": train}}]
    text = plain(shown(tiny.write_recipe(tmp_path, made), 2))
    assert "row r0" in text and "row s0" in text


def test_a_setting_that_needs_more_rows_reads_all(tmp_path: Path) -> None:
    """The replay is larger than the first rows of the earlier stage."""
    many(tmp_path, 400)
    made = tiny.tiny_recipe()
    replay = {"stage": "one", "fraction": 0.7}
    data = {"train": [{"path": "rows.jsonl", "max_rows": 120}], "replay": replay}
    made["stages"] = [
        {"name": "one", "kind": "sft", "data": {"train": [{"path": "rows.jsonl"}]}},
        {"name": "two", "kind": "sft", "data": data},
    ]
    text = plain(shown(tiny.write_recipe(tmp_path, made), 1, stage="two"))
    assert "400 rows, max_length" in text


def test_a_fault_in_the_first_rows_is_an_error_and_in_others_it_is_not_read(tmp_path: Path) -> None:
    path = many(tmp_path, 300)
    rows = tmp_path / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([*lines[:200], "no json\n", *lines[201:]]))
    assert "row r0" in plain(shown(path, 1))
    with raises("data.invalid-json", DataError):
        shown(path, 1, every_row=True)
    rows.write_text("".join([*lines[:20], "no json\n", *lines[21:]]))
    with raises("data.invalid-json", DataError):
        shown(path, 1)


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
