"""Writes the data files of the recipes in this folder: `python recipes/real/prepare.py --out DATA`.

Reads the data sets from the hub, or with `--local FOLDER` from files (see `LOCAL`). Every task is split
into a training and a held-out file, always in the same way, and the rows are in a random but fixed order,
so that `max_rows` of a recipe selects a sample.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# File name for `--local`, without `.jsonl` → data set on the hub: name, config, splits
LOCAL = {
    "code_sft_mbpp": ("google-research-datasets/mbpp", "full", ["train", "validation", "test"]),
    "code_sft_gpteacher": ("sahil2801/CodeAlpaca-20k", None, ["train"]),
    "math_gsm8k_train": ("openai/gsm8k", "main", ["train"]),
    "eval_gsm8k_test": ("openai/gsm8k", "main", ["test"]),
    "general_sft_mixed": ("HuggingFaceTB/smol-smoltalk", None, ["train"]),
    "pref_scored_tulu_human": ("nvidia/HelpSteer3", "preference", ["train"]),
    "eval_ifeval": ("google/IFEval", None, ["train"]),
}
MOST = 20_000  # maximum rows per data set: smol-smoltalk has 460 K


def user(text: str) -> list[Row]:
    """Return a conversation of one turn."""
    return [{"role": "user", "content": text}]


def mbpp(row: Row) -> Row:
    """Convert a row of MBPP; the prompt includes the first test, which has the name of the function."""
    if "messages" in row:
        prompt, response = row["messages"][:-1], row["messages"][-1]["content"]
        number, tests, setup = int(row["id"].split("-")[1]), row["tests"], row["setup"]
    else:
        number, tests, setup = row["task_id"], row["test_list"], row["test_setup_code"]
        test = f"Your code should satisfy this test:\n```python\n{tests[0]}\n```"
        code = row["code"].replace("\r\n", "\n")
        prompt, response = user(f"{row['text']}\n\n{test}"), f"```python\n{code}\n```"
    return {"id": f"mbpp-{number}", "prompt": prompt, "response": response, "tests": tests,
            "setup": setup}  # fmt: skip


def gsm8k(row: Row) -> Row:
    """Convert a row of GSM8K; the response is the whole solution, which ends with `####` and the number."""
    question, answer = row.get("question"), row.get("answer") or row["answer_raw"]
    if question is None:
        question = row["prompt"] if "prompt" in row else row["messages"][0]["content"]
    answer = re.sub("<<.*?>>", "", answer)  # calculator annotations
    return {"prompt": user(question), "response": answer}


def conversation(row: Row) -> Row | None:
    """Convert a conversation; rows with tools are omitted, because SmolLM2's template does not write them."""
    if "messages" not in row:
        text = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        return {"messages": [*user(text), {"role": "assistant", "content": row["output"]}]}
    return None if row.get("tools") else {"messages": row["messages"]}


def pair(row: Row) -> Row | None:
    """Convert a pair judged by people; ties are omitted."""
    if "overall_preference" in row:
        strength = row["overall_preference"]  # -3: the first is much better
        texts = [row["response1"], row["response2"]][:: 1 if strength < 0 else -1]
        prompt, tie = row["context"], strength == 0
    else:
        texts, prompt, tie = [row["chosen"], row["rejected"]], row["prompt"], row["tie"]
    same = texts[0].strip() == texts[1].strip()
    return None if tie or same else {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}


def ifeval(row: Row) -> Row:
    """Convert a row of IFEval without its null arguments: on the hub, every row has all keys."""
    kwargs = [{k: v for k, v in each.items() if v is not None} for each in row["kwargs"]]
    return {"id": f"ifeval-{row['key']}", "prompt": user(row["prompt"]), "kwargs": kwargs,
            "instruction_id_list": row["instruction_id_list"]}  # fmt: skip


def mbpp_held_out(row: Row) -> bool:
    """Return whether a row is in the test split of MBPP: tasks 11 to 510."""
    return 11 <= int(row["id"].split("-")[1]) <= 510


def by_prompt(row: Row) -> bool:
    """Return whether a prompt is held out, as a quarter of all prompts are, with all their rows."""
    return int(_digest(row.get("prompt") or row["messages"][:-1])[:8], 16) % 4 == 0


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read(name: str, local: Path | None) -> Iterable[Row]:
    """Return the raw rows of a data set."""
    if local is not None:
        lines = (local / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return (json.loads(line) for line in lines)
    from datasets import load_dataset

    path, config, splits = LOCAL[name]
    loaded = [load_dataset(path, config, split=split, streaming=True) for split in splits]
    return (row for data in loaded for row in data.take(MOST))


def rows(name: str, local: Path | None, convert: Callable[[Row], Row | None]) -> Iterator[Row]:
    """Yield converted rows in a fixed order that is independent of the order of the data set."""
    found = [made for row in read(name, local) if (made := convert(row)) is not None]
    for made in sorted(found, key=_digest):
        yield {"id": f"{name}-{_digest(made)[:12]}", **made}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent
    parser.add_argument(
        "--out", type=Path, default=here / "data", help="output folder; default: %(default)s"
    )
    parser.add_argument("--local", type=Path, help="folder with the files named in LOCAL")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    never, always = (lambda _: False), (lambda _: True)
    plan: list[tuple[str, str, Callable[[Row], Row | None], Callable[[Row], bool]]] = [
        ("mbpp", "code_sft_mbpp", mbpp, mbpp_held_out),
        ("code", "code_sft_gpteacher", conversation, never),
        ("gsm8k", "math_gsm8k_train", gsm8k, never),
        ("gsm8k", "eval_gsm8k_test", gsm8k, always),
        ("general", "general_sft_mixed", conversation, by_prompt),
        ("pairs", "pref_scored_tulu_human", pair, by_prompt),
        ("ifeval", "eval_ifeval", ifeval, by_prompt),
    ]
    parts: dict[str, list[str]] = {}
    for task, name, convert, held_out in plan:
        for row in rows(name, options.local, convert):
            part = f"{task}_{'heldout' if held_out(row) else 'train'}"
            parts.setdefault(part, []).append(json.dumps(row, ensure_ascii=False) + "\n")
    for part, lines in parts.items():
        (options.out / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{options.out / part}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
