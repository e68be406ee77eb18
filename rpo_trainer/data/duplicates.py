"""Repeated prompts: equal, or equal up to case, white space and Unicode form."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from rpo_trainer.data.rows import Message, Row

Dedup = Literal["exact", "normalized"]


def prompt_key(row: Row) -> bytes:
    """Return a digest of a row's prompt: equal prompts have equal keys."""
    prompt = _prompt(row)
    if not isinstance(prompt, str):
        prompt = json.dumps(prompt, sort_keys=True, default=str)
    return _digest(prompt)


def loose_prompt_key(row: Row) -> bytes:
    """Return a digest of a row's prompt that ignores differences a reader would not notice.

    Texts are NFKC-normalized and case-folded, and white space is collapsed. Of messages only the content
    counts, so that a text and a message with the same text have equal keys.
    """
    prompt = _prompt(row)
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
    return _digest("\n".join(_loose(text) for text in texts))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _loose(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _prompt(row: Row) -> str | list[Message]:
    if "prompt" in row:
        prompt: str | list[Message] = row["prompt"]
        return prompt
    messages: list[Message] = row["messages"]
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: ends[-1]] if ends else messages


def repeated(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows whose prompt equals an earlier one, and those with only an equal loose key."""
    exact: set[bytes] = set()
    loose: set[bytes] = set()
    same, alike = [], []
    for row in rows:
        key, loose_key = prompt_key(row), loose_prompt_key(row)
        if key in exact:
            same.append(row)
        elif loose_key in loose:
            alike.append(row)
        exact.add(key)
        loose.add(loose_key)
    return same, alike


def shared(rows: Iterable[Row], others: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return those of `others` whose prompt is in `rows`: exactly, and by the loose key only."""
    exact: set[bytes] = set()
    loose: set[bytes] = set()
    for row in rows:
        exact.add(prompt_key(row))
        loose.add(loose_prompt_key(row))
    same = [prompt_key(row) in exact for row in others]
    alike = [loose_prompt_key(row) in loose for row in others]
    return (
        [row for row, yes in zip(others, same, strict=True) if yes],
        [row for row, yes, no in zip(others, alike, same, strict=True) if yes and not no],
    )
