"""Evaluates each policy of a finished run on held-out prompts of three tasks, decoded greedily.

    python recipes/real/measure.py RUN --rows 200

An evaluation in a recipe has one scorer; this script measures GSM8K (correct number), MBPP (all asserts pass)
and IFEval (all instructions followed), and the length and repetitiveness of the responses. Writes
RUN/tasks.json and prints a table with 95 % intervals (bootstrap over prompts); the last three columns have
the tasks in that order. The verifier `asserts` runs code written by the model: see docs/security.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rpo_trainer.models.loading import load_model_named, load_tokenizer_named
from rpo_trainer.recipe.schema import GenerateSpec
from rpo_trainer.rewards.evaluate import Estimate, estimate, respond
from rpo_trainer.rewards.verifiers import get_verifier
from rpo_trainer.runtime.cores import usable_cores

TASKS = {"gsm8k": "numeric", "mbpp": "asserts", "ifeval": "instructions"}
HEADER = """| after | GSM8K | MBPP | IFEval | tokens | repetition | truncated |
|---|---|---|---|---|---|---|"""
N = 4  # size of the n-grams that count as repetitions


def prompts(data: Path, task: str, count: int) -> list[dict[str, Any]]:
    """Return the first held-out rows of a task."""
    lines = (data / f"{task}_heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    return [{**row, "ground_truth": row.get("response"), "task": task} for row in rows]


def repetition(text: str) -> float:
    """Return the fraction of word n-grams that occur earlier in the text."""
    words = text.split()
    grams = [tuple(words[i : i + N]) for i in range(len(words) - N + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rewards(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> list[float]:
    """Return the reward of each response by the verifier of its task."""

    def reward(both: tuple[dict[str, Any], dict[str, Any]]) -> float:
        row, answer = both
        verifier = get_verifier(TASKS[row["task"]], allow_code_execution=True)
        return verifier.prepare(row)(answer["responses"][0])

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(reward, zip(rows, answers, strict=True)))


def measure(name: str, rows: list[dict[str, Any]], spec: GenerateSpec) -> dict[str, Any]:
    """Return the measurements of one policy by task, each with its interval."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model_named(name).to(device), load_tokenizer_named(name)
    answers = respond(model, tokenizer, rows, generate=spec, greedy=False, seed=0)
    scored = rewards(rows, answers)
    found: dict[str, Any] = {}
    for task in TASKS:
        own = [i for i, row in enumerate(rows) if row["task"] == task]
        texts = [answers[i]["responses"][0] for i in own]
        values: dict[str, list[float]] = {
            "right": [float(scored[i] == 1) for i in own],
            "reward": [scored[i] for i in own],
            "tokens": [float(len(tokenizer(text)["input_ids"])) for text in texts],
            "repetition": [repetition(text) for text in texts],
            "cut": [float(not answers[i]["finished"][0]) for i in own],
        }
        found[task] = {key: asdict(estimate(each, 0)) for key, each in values.items()}
        found[task]["prompts"] = len(own)
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """Format the table row of a policy."""
    cells = []
    for task in TASKS:
        right = Estimate(**found[task]["right"])
        cells.append(f"{right.value:.1%} ({right.low:.1%} to {right.high:.1%})")
    for key, form in (("tokens", ".0f"), ("repetition", ".2f"), ("cut", ".0%")):
        cells.append(" / ".join(f"{found[task][key]['value']:{form}}" for task in TASKS))
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Measure the policies of a run, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of a finished run")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(__file__).parent / "data",
        help="folder of the held-out files",
    )
    parser.add_argument(
        "--stages",
        help="stages to measure, such as model,dpo (model: the initial model); default: all",
    )
    parser.add_argument("--rows", type=int, default=200, help="prompts per task")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=600)
    options = parser.parse_args()
    chain = json.loads((options.run / "chain.json").read_text(encoding="utf-8"))
    policies = {"model": chain["model"]["name_or_path"]}
    for stage in chain["stages"]:
        if stage["state"] == "done":
            policies[stage["name"]] = str(options.run / stage["name"] / "final")
    rows = [row for task in TASKS for row in prompts(options.data, task, options.rows)]
    spec = GenerateSpec(
        responses=1, top_k=1, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
    )
    print(HEADER, flush=True)
    found = {}
    for name in options.stages.split(",") if options.stages else policies:
        if name not in policies:
            print(f"{name} is not a finished stage of this run", flush=True)
            continue
        found[name] = measure(policies[name], rows, spec)
        print(line(name, found[name]), flush=True)
        (options.run / "tasks.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
