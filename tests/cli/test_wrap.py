"""Errors are wrapped at words in a terminal, and left alone elsewhere."""

from __future__ import annotations

import sys

import pytest

from rpo_trainer.cli.wrap import wrap

TEXT = "a.yaml:3: " + "word " * 30 + "[code]\n  fix: " + "word " * 30 + "/a/path/of/" + "x" * 90


def test_lines_fit_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = wrap(TEXT).splitlines()
    assert len(lines) > 4 and all(len(line) <= 80 for line in lines if "/a/path" not in line)
    assert " ".join(" ".join(lines).split()) == " ".join(TEXT.split())  # nothing is lost or split
    fix = next(n for n, line in enumerate(lines) if line.startswith("  fix: "))
    assert lines[fix + 1].startswith("       word")


def test_elsewhere_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert wrap(TEXT) == TEXT
