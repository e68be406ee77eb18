"""The `numeric` verifier: exact comparison of the final number of a response with the ground truth."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from fractions import Fraction

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.rewards.verifiers.base import Check, Verifier, ground_truth

_CURRENCY = "$€£¥₹"
_DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?![\d.]))?"
_FRACTION = r"\\[dt]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}"
_NUMBER = re.compile(
    # Not inside a word, an exponent ("m^2") or a longer number. A minus is a sign unless it directly
    # follows something that can be subtracted from.
    rf"(?<![\w^])(?<!\d\.)(?<!\^\{{)"
    rf"(?P<sign>(?<![\w)%])[-−+](?=[\d.{_CURRENCY}\\]))?"
    rf"\\?[{_CURRENCY}]?\s?"
    rf"(?P<inner>(?<=[{_CURRENCY}])[-−])?"
    rf"(?:(?P<whole>\d+)\s+(?P<over>\d+)\s*/\s*(?P<under>\d+)(?![\d.])"
    rf"|(?:(?P<mixed>\d+)\s*)?{_FRACTION}"
    rf"|(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})(?!\s*[/\d])"
    rf"|(?P<plain>{_DECIMAL}))"
    r"(?P<percent>\s?\\?%)?",
)
_LONGEST = 1000  # digits: longer numbers are slow to parse and not plausible answers
_SEPARATORS = re.compile(r",|\{,\}|\\,")


def _numeric(row: Row) -> Check:
    """Return 1 if the response's answer equals the number in `ground_truth`, else 0.

    The answer is the last number in the last \\boxed{…}, else the first after the last `####`, else the
    last of the entire response, as in GSM8K. Thousands separators, currencies, units, fractions (3/4, 1
    1/2, \\frac{3}{4}) and exponents are parsed; numbers are compared exactly. 50% equals both 50 and
    0.5.
    """
    truth = last_number(ground_truth(row))
    if truth is None:
        raise RowError("ground_truth contains no number", code="verifier.bad-ground-truth")

    def check(response: str) -> float:
        found = last_number(response)
        return float(found is not None and not truth.isdisjoint(found))

    return check


def last_number(text: str) -> set[Fraction] | None:
    """Return the possible values of the answer in a text; None without a number."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return _last_in(boxed)
    _, mark, answer = text.rpartition("####")
    return next(_numbers_in(answer), None) if mark else _last_in(text)


def _last_in(text: str) -> set[Fraction] | None:
    last = deque(_numbers_in(text), maxlen=1)
    return last[0] if last else None


def _numbers_in(text: str) -> Iterator[set[Fraction]]:
    for match in _NUMBER.finditer(text):
        readings = _readings(match)
        if readings is not None:
            yield readings


def _readings(match: re.Match[str]) -> set[Fraction] | None:
    value = _value(match)
    if value is None:
        return None
    if match["sign"] in ("-", "−") or match["inner"]:
        value = -value
    return {value, value / 100} if match["percent"] else {value}


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the absolute value of a number; None for division by zero and numbers that are too long."""
    try:
        if match["plain"]:
            return _decimal(match["plain"])
        if match["top"]:
            return _decimal(match["top"]) / _decimal(match["bottom"])
        if match["whole"]:
            return _decimal(match["whole"]) + _decimal(match["over"]) / _decimal(match["under"])
        # The groups of _FRACTION have no names, so that it could be used twice.
        top, bottom = match.groups()[_FRACTION_AT : _FRACTION_AT + 2]
        return _decimal(match["mixed"] or "0") + _decimal(top) / _decimal(bottom)
    except (ZeroDivisionError, ValueError):
        return None


_BRACE = re.compile(r"[{}]")
_FRACTION_AT = _NUMBER.groupindex["mixed"]  # groups() counts from 0, groupindex from 1


def _decimal(text: str) -> Fraction:
    if len(text) > 2 * _LONGEST:
        raise ValueError("too long")
    digits = _SEPARATORS.sub("", text)
    if len(digits) > _LONGEST:
        raise ValueError("too long")
    return Fraction(digits)


def _last_boxed(text: str) -> str | None:
    """Return the text in the braces of the last \\boxed{…}."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return text[start:]


NUMERIC = Verifier("numeric", 1.0, ("ground_truth",), _numeric)
