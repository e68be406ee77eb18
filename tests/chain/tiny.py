"""A chain of all kinds of stages on a model of two layers, which takes seconds."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from rpo_trainer.chain import run_chain
from rpo_trainer.recipe import LoadedRecipe, load_recipe
from rpo_trainer.recipe.yaml_document import dump
from rpo_trainer.stages.prepare import DATA_FOLDER
from rpo_trainer.trainers.checkpoint import MANIFEST

Recipe = dict[str, Any]
STAGES = ("code", "general", "dpo", "rpo-1", "rpo-2")
SFT_STEPS, PREFERENCE_STEPS = 6, 3
_SAMPLED = {
    "generate": {"responses": 3, "max_new_tokens": 5, "batch_size": 48},
    "score": {"verifier": "partial_match"},
}


def written(folder: Path) -> set[str]:
    """The files below a directory, by their relative paths, without prepared data."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if DATA_FOLDER not in path.parts}


def task(name: str, split: str, size: int, **more: Any) -> dict[str, Any]:
    return {"task": f"quickstart/{name}", "split": split, "size": size, **more}


def tiny_recipe() -> Recipe:
    """Code SFT → general SFT with replay → DPO on sampled pairs → RPO twice on sampled responses."""
    return {
        "model": {
            "from_config": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                "max_position_embeddings": 64, "tie_word_embeddings": True,
            },
            "tokenizer": "characters", "dtype": "float32",
        },
        "seed": 3,
        "defaults": {
            "max_length": 64, "micro_batch_size": 8, "global_batch_size": 8,
            "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1,
        },
        "stages": [
            {
                "name": "code", "kind": "sft", "max_steps": SFT_STEPS, "learning_rate": 1e-2,
                "data": {
                    "train": [task("code", "train", 40)], "eval": [task("code", "heldout", 8)],
                },
            },
            {
                "name": "general", "kind": "sft", "max_steps": SFT_STEPS, "learning_rate": 1e-2,
                "data": {
                    "train": [task("general", "train", 40)],
                    "replay": {"stage": "code", "fraction": 0.1, "of": "mix"},
                },
            },
            {
                "name": "dpo", "kind": "dpo", "beta": 0.5, "sft_loss_weight": 0.05,
                "max_steps": PREFERENCE_STEPS,
                "data": {
                    "train": [task("general", "preference", 48, seed=1)], **_SAMPLED,
                    "pairs": {"select": "best_worst"},
                },
            },
            {
                "name": "rpo", "kind": "rpo", "repeat": 2, "beta": 0.5, "sft_loss_weight": 0.005,
                "max_steps": PREFERENCE_STEPS,
                "data": {
                    "train": [task("general", "preference", 48, seed=2)], **_SAMPLED,
                    "pairs": {"select": "all_responses"},
                },
            },
        ],
    }  # fmt: skip


def stage_of(recipe: Recipe, name: str) -> dict[str, Any]:
    return next(stage for stage in recipe["stages"] if stage["name"] == name)


def changed(recipe: Recipe, key: str, value: Any) -> Recipe:
    """Return a copy with `stage.field` (or a field of the recipe) set."""
    new = copy.deepcopy(recipe)
    stage, _, field = key.rpartition(".")
    (stage_of(new, stage) if stage else new)[field] = value
    return new


def write_recipe(folder: Path, recipe: Recipe) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    return path


def load(folder: Path, recipe: Recipe | None = None) -> LoadedRecipe:
    return load_recipe(write_recipe(folder, recipe or tiny_recipe()))


def run(folder: Path, recipe: Recipe | None = None, **settings: Any) -> Path:
    """Run the recipe in `folder`/run."""
    return run_chain(load(folder, recipe), folder / "run", **settings)


def weights(run_dir: Path) -> dict[str, str]:
    """Return hashes of the weights of every finished output."""
    return {
        path.parent.parent.name: entry["xxh3_128"]
        for path in sorted(run_dir.glob(f"*/final/{MANIFEST}"))
        for name, entry in json.loads(path.read_text())["files"].items()
        if name.endswith(".safetensors")
    }


def records(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the records of chain.json by stage."""
    return {r["name"]: r for r in json.loads((run_dir / "chain.json").read_text())["stages"]}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def metric_steps(run_dir: Path, stage: str) -> list[tuple[int, bool]]:
    """Return the steps of a stage in metrics.jsonl, and whether each line is an evaluation."""
    return [(m["step"], "eval_loss" in m) for m in metrics(run_dir) if m["stage"] == stage]


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the properties of every file below a directory that change when it is rewritten."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", ".lock-holder")
    }


def cut_before(finished: Path, run_dir: Path, stage: str) -> Path:
    """Return a copy of a finished run as it was before `stage` began."""
    later = STAGES[STAGES.index(stage) :]
    shutil.copytree(finished, run_dir, ignore=shutil.ignore_patterns(*later, ".lock*"))
    state = json.loads((run_dir / "chain.json").read_text())
    state.pop("digest", None)
    for record in state["stages"]:
        if record["name"] in later:
            for key in set(record) - {"name", "kind", "init", "reference", "spec"}:
                del record[key]
            record["state"] = "pending"
    (run_dir / "chain.json").write_text(json.dumps(state))
    lines = [json.dumps(m) for m in metrics(run_dir) if m["stage"] not in later]
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    keys = [key for key in (run_dir / "reference-cache").iterdir() if "dpo" in later]
    for key in keys:
        shutil.rmtree(key)
    return run_dir
