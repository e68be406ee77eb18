"""Rows of the data sets that recipes/real/prepare.py reads, as on the hub and as in local files."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

Row = dict[str, Any]
REAL = Path(__file__).parents[1] / "recipes" / "real"
WORDS = (
    "sun",
    "sea",
    "bread",
    "stone",
    "tree",
    "lamp",
    "road",
    "wind",
    "clock",
    "bridge",
    "snow",
    "coin",
)
# The function of a task; the first test is shown in the prompt.
FUNCTIONS = {
    1: ("adds two numbers", "def add(a, b):\n    return a + b", "add(1, 2) == 3"),
    520: ("doubles a number", "def double(a):\n    return 2 * a", "double(4) == 8"),
    11: ("negates a number", "def negate(a):\n    return -a", "negate(5) == -5"),
}


def said(role: str, text: str) -> Row:
    return {"role": role, "content": text}


def turns(*texts: str) -> list[Row]:
    return [said(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def raw(name: str, *, hub: bool) -> list[Row]:
    """The rows of a data set, see `LOCAL` of prepare.py."""
    rows: list[Row] = []
    if name == "code_sft_mbpp":
        for number, (what, code, test) in FUNCTIONS.items():
            tests = [f"assert {test}"]
            asked = f"Write a function that {what}."
            shown = f"\n\nYour code should satisfy this test:\n```python\n{tests[0]}\n```"
            rows.append(
                {"task_id": number, "text": asked, "code": code.replace("\n", "\r\n"),
                 "test_list": tests, "test_setup_code": "", "challenge_test_list": []}
                if hub else
                {"id": f"mbpp-{number}", "messages": turns(asked + shown, f"```python\n{code}\n```"),
                 "tests": tests, "setup": "", "challenge_tests": []}
            )  # fmt: skip
    elif name == "code_sft_gpteacher":
        for word in WORDS[:3]:
            asked, answer = f"Print this word in Python.\n\n{word}", f"print({word!r})"
            rows.append(
                {"instruction": "Print this word in Python.", "input": word, "output": answer}
                if hub
                else {"messages": turns(asked, answer)}
            )
    elif name in ("math_gsm8k_train", "eval_gsm8k_test"):
        for n in range(2, 5):
            asked = f"A box holds {n} pens. How many do {n + 1} boxes hold?"
            answer = f"They hold {n} * {n + 1} = <<{n}*{n + 1}={n * (n + 1)}>>{n * (n + 1)} pens.\n"
            answer += f"#### {n * (n + 1)}"
            rows.append(
                {"question": asked, "answer": answer}
                if hub
                else {"prompt": asked, "answer_raw": answer, "ground_truth": str(n * (n + 1))}
                if name == "eval_gsm8k_test"
                else {"messages": turns(asked, "-"), "answer_raw": answer}
            )
    elif name == "general_sft_mixed":
        for word in WORDS:
            messages = turns(f"Name a {word}.", f"A {word}.", "Again?", f"The {word}.")
            rows.append({"messages": messages})
        rows.append({"messages": turns("Weather?", "Rain."), "tools": [{"name": "weather"}]})
    elif name == "pref_scored_tulu_human":
        for word in WORDS:
            asked, good, bad = turns(f"Describe a {word}."), f"A {word} is a thing.", f"No {word}."
            rows.append(
                {"context": asked, "response1": bad, "response2": good, "overall_preference": 2}
                if hub
                else {"prompt": asked, "chosen": good, "rejected": bad, "tie": False}
            )
        tie = {"overall_preference": 0, "context": turns("Q"), "response1": "a", "response2": "b"}
        rows.append(
            tie if hub else {"prompt": turns("Q"), "chosen": "a", "rejected": "b", "tie": 1}
        )
    elif name == "eval_ifeval":
        for number, word in enumerate(WORDS):
            kwargs: list[Row] = [{}, {"relation": "at least", "num_words": 12}]
            if hub:
                kwargs = [{"relation": None, "num_words": None} | own for own in kwargs]
            ids = ["punctuation:no_comma", "length_constraints:number_words"]
            asked = f"Write at least 12 words about a {word}, without commas."
            rows.append(
                {"key": number, "prompt": asked, "instruction_id_list": ids, "kwargs": kwargs}
            )
    return rows


def script(name: str) -> ModuleType:
    """Return a script of recipes/real as a module."""
    spec = importlib.util.spec_from_file_location(f"recipes_real_{name}", REAL / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_local(folder: Path, *, hub: bool = False) -> ModuleType:
    """Write all data sets in the form that prepare.py reads with `--local`, and return its module."""
    prepare = script("prepare")
    folder.mkdir(parents=True)
    for name in prepare.LOCAL:
        lines = [json.dumps(row) + "\n" for row in raw(name, hub=hub)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return prepare


def prepared(folder: Path, *, hub: bool = False) -> Path:
    """Copy the recipes to `folder` with data prepare.py creates from `raw`; return its data directory."""
    local, data = folder / "local", folder / "data"
    prepare = write_local(local, hub=hub)
    for recipe in REAL.glob("*.yaml"):
        shutil.copy(recipe, folder)
    with mock.patch.object(sys, "argv", ["prepare.py", "--local", str(local), "--out", str(data)]):
        prepare.main()
    return data
