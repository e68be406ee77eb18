"""The number a response ends with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from rpo_trainer.rewards.verifiers import get_verifier
from tests.rewards.failing import unverifiable

RIGHT = [
    # GSM8K: the last number, in any notation
    ("18", "16 - 3 - 4 = 9\nShe makes 9 * 2 = $18"),
    ("18", "A: 18"),
    ("18", "The answer is 18."),
    ("18", "She makes $18.00 a day!"),
    ("18", "#### 18"),
    ("18", "#### 18\n"),
    ("18", "<<9*2=18>>18 dollars"),
    ("18", "18 eggs"),
    ("18", "**18**"),
    # the marked or boxed number has precedence over later ones
    ("18", "#### 18 (that is 2 a piece)"),
    ("18", r"so \boxed{18}, which is 3 more than 15"),
    ("18", r"first \boxed{3}, then \boxed{\text{18 dollars}}. 7 left"),
    ("18", r"\boxed{18"),
    ("1/2", r"\boxed{\frac{1}{2}} #### 3"),
    # separators, currencies, signs
    ("1234567", "1,234,567 people"),
    ("1234", r"1{,}234"),
    ("1234.5", "$1,234.50"),
    ("-5", "it falls to -5 degrees"),
    ("-5", "\u22125"),
    ("-5", "-$5"),
    ("-5", "$-5"),
    ("5", "10-5"),  # a minus between numbers is no sign
    ("5", "x = 10 - 5"),
    ("5", "(10)-5"),
    ("5", "+5"),
    ("500", "Rs.500"),
    ("20", "\u20ac20"),
    ("0.5", ".5"),
    # fractions
    ("3/4", "0.75"),
    ("0.75", "3/4"),
    ("0.75", "3 / 4 of a mile"),
    ("1.5", "1 1/2 cups"),
    ("1.5", r"1\frac{1}{2}"),
    ("-1/2", r"-\dfrac{1}{2}"),
    # percent: omitted or applied
    ("50", "50%"),
    ("50%", "50 percent is 50"),
    ("50%", "0.5"),
    ("0.5", r"50\%"),
    # exponents, units
    ("1500", "1.5e3"),
    ("5", "5 m^2"),
    ("5", "5 m^{2}"),
    ("5", "5 kg of CO2"),
    ("3", "there are 3 (see step2)"),
]
WRONG = [
    ("18", "17"),
    ("18", "It is 18, or rather 19"),
    ("18", ""),
    ("18", "no number at all"),
    ("18", "eighteen"),
    ("18", r"\boxed{} 18"),
    ("18", "#### none, though 18 came up before"[:9]),
    ("5", "-5"),
    ("1234", "1,23"),
    ("0.333", "1/3"),
    ("5", "1/0"),  # no number: an empty answer is not 0
    ("0", "1/0"),
    ("18", "1e9999999"),
    ("9999999", "1e9999999"),
]


@pytest.mark.parametrize(("truth", "response"), RIGHT)
def test_right(truth: str, response: str) -> None:
    assert get_verifier("numeric")(response, {"ground_truth": truth}) == 1.0


@pytest.mark.parametrize(("truth", "response"), WRONG)
def test_wrong(truth: str, response: str) -> None:
    assert get_verifier("numeric")(response, {"ground_truth": truth}) == 0.0


def test_a_truth_may_be_a_whole_solution() -> None:
    row = {"ground_truth": "16 - 3 - 4 = <<16-3-4=9>>9\n#### 1,800"}
    assert get_verifier("numeric")("A: 1800", row) == 1.0


def test_a_truth_without_a_number_cannot_be_verified() -> None:
    with unverifiable("verifier.bad-ground-truth"):
        get_verifier("numeric").prepare({"ground_truth": "many"})


def test_agreement_with_the_given_correctness_of_real_solutions(shared_dir: Path) -> None:
    counts: Counter[tuple[float, float]] = Counter()
    with (shared_dir / "data" / "dev" / "pref_multi_gsm8k.jsonl").open() as file:
        for row in map(json.loads, file):
            check = get_verifier("numeric").prepare(row)
            counts.update(zip(row["rewards"], map(check, row["responses"]), strict=True))
    assert counts == {(0.0, 0.0): 2548, (1.0, 1.0): 1560}
