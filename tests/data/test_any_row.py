"""A row with any value in any field is accepted or refused with its id; it never crashes the program."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES
from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.formats import FORMATS, PROMPT_FORMATS, Format
from rpo_trainer.data.sources import RawSource
from rpo_trainer.errors import DataError
from tests.anything import ANYTHING, LIKELY, places, spoiled
from tests.data.test_adapt_rows import PAIRS, SFT, A, Q

RATED = {"prompt": "p", "response": "r"}
OTHERS: dict[str, dict[str, Any]] = {
    "helpsteer2_pairs": {**RATED, "helpfulness": 3},
    "margin": {"prompt": "p", "chosen": "x", "rejected": "y", "margin": 1.5},
    "orca": {"system": "s", "question": "q", "chosen": "x", "rejected": "y"},
    "attributes": {**RATED, "attributes": {"helpfulness": 3, "verbosity": None}},
    "helpsteer2": {**RATED, **dict.fromkeys(HELPSTEER_ATTRIBUTES, 3)},
    "score": {**RATED, "score": 0.5},
}
ROWS = [
    *((FORMATS[case.split(",")[0].split()[0]], case, row) for case, (row, _) in SFT.items()),
    *((FORMATS[case.split(",")[0].split()[0]], case, row) for case, (row, _) in PAIRS.items()),
    *((FORMATS[name], name, row) for name, row in OTHERS.items()),
    (PROMPT_FORMATS["prompt"], "prompt", {"prompt": [Q], "ground_truth": "a"}),
    (PROMPT_FORMATS["messages"], "messages, as prompt", {"messages": [Q, A]}),
]


@pytest.mark.parametrize(("format", "case", "row"), ROWS, ids=[case for _, case, _ in ROWS])
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_row_with_any_value_in_any_field(
    format: Format, case: str, row: dict[str, Any], data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(list(places(row))))
    bad = spoiled(row, path, data.draw(LIKELY | ANYTHING), data.draw(st.integers(0, 5)) == 0)
    # A good row before it has all columns, so that the format is detected.
    raw = RawSource("src", [copy.deepcopy(row), bad], [1, 2], "file.jsonl")
    table = PROMPT_FORMATS if format.kind == "prompt" else FORMATS
    name = next(name for name, known in table.items() if known is format)
    try:
        found = adapt(raw, kind=format.kind, format=name, audit=Audit())
    except DataError as error:
        refusal = str(error)
    else:
        refusal = "src:2"
        json.dumps(found, allow_nan=False)
        assert all(isinstance(text, str) for new in found for text in new.get("responses", []))
    assert re.search("src:[12]", refusal)  # joined rows have the id of the first one


def test_every_format_is_spoiled() -> None:
    assert {id(format) for format, _, _ in ROWS} >= {id(format) for format in FORMATS.values()}
