from __future__ import annotations

from pathlib import Path

import pytest

from rpo_trainer.report.paths import without_absolute_paths

RUN = Path("/srv/runs/mine")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run_dir: /srv/runs/mine", "run_dir: ."),
        ("init: /srv/runs/mine/dpo/final", "init: ./dpo/final"),
        ("/srv/runs/other/final", "../other/final"),
        ("/srv/runs/mine-too/x", "../mine-too/x"),
        ("path: /home/jdoe/rows.jsonl", "path: …/rows.jsonl"),
        ("'/home/jdoe/a.json', \"/data/b.json\"", "'…/a.json', \"…/b.json\""),
        ("in /home/jdoe", "in ~"),
        ("~/models/llama", "…/llama"),
        (r"C:\Users\jdoe\rows.jsonl", "…/rows.jsonl"),
        ("file:///home/jdoe/x", "…/x"),
    ],
)  # fmt: skip
def test_absolute_paths_are_shortened(text: str, shown: str) -> None:
    assert without_absolute_paths(text, RUN) == shown


@pytest.mark.parametrize(
    "text",
    ["https://example.org/a/b", "../data/x.jsonl", "runs/mine/x", "org/model", "and/or", "1/2", "</s>", "/"],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert without_absolute_paths(text, RUN) == text
