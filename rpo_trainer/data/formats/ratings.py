"""Rating formats: one response and its ratings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES
from rpo_trainer.data.conversation import marked_messages, preference
from rpo_trainer.data.formats.spec import Format, Raw
from rpo_trainer.data.rows import Row, RowError, reward_fault


def _rated(raw: Raw, prompt: object, ratings: Mapping[str, Any]) -> Row:
    for name, value in ratings.items():
        if value is not None and (fault := reward_fault(value)):
            raise RowError(f"the rating `{name}` is {fault}", code="data.bad-rating")
    return {
        **preference(prompt, [raw["response"]], ["`response`"]),
        "attributes": {str(n): None if v is None else float(v) for n, v in ratings.items()},
    }


def _attributes(raw: Raw) -> Row:
    ratings = raw["attributes"]
    if not isinstance(ratings, Mapping) or not ratings:
        raise RowError("`attributes` is not an object of name: rating", code="data.wrong-type")
    return _rated(raw, raw["prompt"], ratings)


def _score(raw: Raw) -> Row:
    return _rated(raw, raw["prompt"], {"score": raw["score"]})


def _helpsteer2(raw: Raw) -> Row:
    row = _rated(raw, marked_messages(raw["prompt"]), {n: raw.get(n) for n in HELPSTEER_ATTRIBUTES})
    for name, value in row["attributes"].items():
        if value is not None and not 0 <= value <= 4:
            raise RowError(f"`{name}` is not a number from 0 to 4", code="data.rating-out-of-range")
    return row


_RATED = ("prompt", "response")

# In the order of detection, the most specific columns first.
RATING_FORMATS: dict[str, Format] = {
    "attributes": Format("rating", (*_RATED, "attributes"), (), _attributes),
    "helpsteer2": Format(
        "rating",
        (*_RATED, *HELPSTEER_ATTRIBUTES),
        (),
        _helpsteer2,
        nullable=HELPSTEER_ATTRIBUTES,
    ),
    "score": Format("rating", (*_RATED, "score"), (), _score),
}
