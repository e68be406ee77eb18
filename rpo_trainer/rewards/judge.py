"""LLM judge of two responses: queried in both orders; only a consistent verdict counts."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

from rpo_trainer.data.judge_bias import EQUAL, FIRST, SECOND
from rpo_trainer.data.rows import Row
from rpo_trainer.errors import RecipeError
from rpo_trainer.redact import redact
from rpo_trainer.rewards.endpoint import Endpoint, Unreadable, message_of
from rpo_trainer.rewards.endpoint_messages import prompt_text, response_text
from rpo_trainer.runtime.files import read_text

# {prompt}, {first} and {second} are replaced; the answer must end with [[A]], [[B]] or [[C]].
TEMPLATE = """\
Two assistants have answered the same conversation. Say which answer serves the user better: is it \
right, does it do what was asked, is it clear? Neither the order of the answers nor their \
length is a reason to prefer one.

<conversation>
{prompt}
</conversation>

<answer_A>
{first}
</answer_A>

<answer_B>
{second}
</answer_B>

Give your reasons in a few sentences. Then end with your verdict, and nothing after it: [[A]] if \
answer A is better, [[B]] if answer B is better, [[C]] if they are equally good.
"""
_MOST_BYTES = 2**20
_PLACES = ("{prompt}", "{first}", "{second}")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


def read_template(path: Path | None) -> str:
    """Return the prompt template in a file, or the built-in one.

    Raises:
        RecipeError: the file cannot be read, or a placeholder is missing.
    """
    if path is None:
        return TEMPLATE
    try:
        text = read_text(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise RecipeError(
            "the judge's template cannot be read",
            code="judge.template-not-readable",
            where=str(path),
            why=str(error),
            fix="give a text file in UTF-8, or remove `template` to use the built-in one",
        ) from None
    missing = [place for place in _PLACES if place not in text]
    if missing:
        raise RecipeError(
            f"the judge's template has no {', '.join(missing)}",
            code="judge.missing-placeholder",
            where=str(path),
            why="without it, the judge does not receive the texts to compare",
            fix=f"add {', '.join(_PLACES)}, and request the verdict [[A]], [[B]] or [[C]]",
        )
    return text


def fill_template(template: str, prompt: str, first: str, second: str) -> str:
    """Fill the placeholders of a template; text that looks like a placeholder in a value is kept."""
    texts = dict(zip(_PLACES, (prompt, first, second), strict=True))
    pattern = "|".join(map(re.escape, _PLACES))
    return re.sub(pattern, lambda match: texts[match[0]], template)


def read_verdict(answer: Any) -> tuple[str, str]:
    """Return the last verdict (A, B or C) and the text of an answer. Raises Unreadable without a verdict."""
    text = message_of(answer)
    found = _VERDICT.findall(text)
    if not found:
        # Redacted before truncation: part of a key could be left otherwise.
        raise Unreadable(
            f"the judge's answer has no verdict: {' '.join(redact(text).split())[-80:]!r}",
            code="judge.no-verdict",
        )
    return found[-1], text


def judge_row(endpoint: Endpoint, template: str, row: Row, **options: Any) -> dict[str, Any]:
    """Score a row's responses by comparison: the mean over comparisons of 1 (won), ½ (equal) and 0 (lost).

    Every pair of responses is compared in both orders: K (K − 1) requests for K responses.

    Returns:
        `rewards`, None for a response without a consistent comparison; and `judge`, the comparisons with
        both unchanged answers.

    Raises:
        RowFailed: a request failed after all retries.
    """
    prompt = prompt_text(row)
    responses = [response_text(row, number) for number in range(len(row["responses"]))]
    points: list[list[float]] = [[] for _ in responses]
    comparisons = []
    for a, b in combinations(range(len(responses)), 2):
        verdicts, answers = [], []
        for first, second in ((a, b), (b, a)):
            text = fill_template(template, prompt, responses[first], responses[second])
            messages = [{"role": "user", "content": text}]
            verdict, answer = endpoint.chat(messages, read_verdict, **options)
            verdicts.append(verdict)
            answers.append(answer)
        better = _consistent(*verdicts)
        if better is not None:
            points[a].append(better)
            points[b].append(1 - better)
        comparisons.append(
            {"responses": [a, b], "verdicts": verdicts, "better": better, "answers": answers}
        )
    rewards = [sum(p) / len(p) if p else None for p in points]
    return {"rewards": rewards, "judge": comparisons}


def _consistent(straight: str, swapped: str) -> float | None:
    """Return the points of response a of (a, b); None if the two orders disagree."""
    if straight == swapped == EQUAL:
        return 0.5
    if (straight, swapped) == (FIRST, SECOND):
        return 1.0
    return 0.0 if (straight, swapped) == (SECOND, FIRST) else None
