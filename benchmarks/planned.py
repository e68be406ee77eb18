"""Compares the memory that `rpo-trainer plan` predicts with that of training, by part, on one device.

    python benchmarks/planned.py                                   # 42 M parameters, all trained
    python benchmarks/planned.py --size 1b --dtype bfloat16
    python benchmarks/planned.py --size 8b --dtype bfloat16 --lora 16 --checkpointing
    python benchmarks/planned.py --size 8b --dtype bfloat16 --lora 16 --frozen float32

It writes a recipe with one DPO stage, plans it with the functions of `rpo-trainer plan`, and trains a few
steps with those of `rpo-trainer run`. Frozen base weights have the dtype of the computation, or float32
with `--frozen float32`. Measured memory is what torch has allocated on a GPU, and on a CPU what the process
uses beyond what it used before the model was created.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
from common import DEVICE, SIZES, lengths_of, make_rows, make_tokenizer, quiet
from transformers import TrainerCallback

from rpo_trainer.models.adapters import with_adapter
from rpo_trainer.models.loading import load_model
from rpo_trainer.plan import DeviceMemory, plan_recipe
from rpo_trainer.recipe import LoadedRecipe, expand_stages, load_recipe
from rpo_trainer.runtime.memory import peak_memory
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.settings import frozen_dtype, lora_config, make_trainer

PARTS = ("weights", "gradients", "optimizer", "activations", "reference", "peak")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", default="42m", choices=SIZES, help="model size")
    parser.add_argument("--vocabulary", type=int, help="vocabulary size; default: that of --size")
    parser.add_argument(
        "--dtype", default="float32", help="dtype of the computation, as in a recipe"
    )
    parser.add_argument(
        "--lora", type=int, metavar="R", help="train an adapter of rank R on all linear layers"
    )
    parser.add_argument(
        "--frozen",
        choices=["auto", "float32"],
        default="auto",
        help="dtype of the frozen base weights, as `frozen_dtype` in a recipe",
    )
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing")
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--batch", type=int, default=4, help="pairs per optimizer step")
    parser.add_argument("--micro", type=int, default=2, help="pairs per forward pass")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--lengths", type=Path, help="CSV or JSONL of real pairs; see common.py")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the result to FILE as one line"
    )
    args = parser.parse_args()
    args.vocabulary = args.vocabulary or SIZES[args.size].vocabulary
    if args.frozen != "auto" and args.lora is None:
        parser.error("--frozen requires --lora")
    return args


def write_recipe(args: argparse.Namespace, folder: Path) -> Path:
    """Write the recipe, the tokenizer and the rows. JSON is valid YAML."""
    make_tokenizer(args.vocabulary).save_pretrained(folder / "tokenizer")
    count = args.batch * args.steps
    if args.lengths:
        rows = make_rows(count, lengths_of(args.lengths, count, 2), args.vocabulary, jitter=0.0)
    else:
        rows = make_rows(count, [(args.prompt, [args.response] * 2)], args.vocabulary)

    def text(ids: list[int]) -> str:
        return "".join(f" w{n}" for n in ids if n > 1)

    lines = [
        {"id": str(i), "prompt": text(row.prompt), "chosen": text(best), "rejected": text(other)}
        for i, row in enumerate(rows)
        for best, other in [row.responses]
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = SIZES[args.size]
    stage = {
        "name": "dpo", "kind": "dpo", "beta": 0.1, "learning_rate": 1e-6,
        "data": {"train": [{"path": "rows.jsonl"}]},
        "max_length": 32768, "max_steps": args.steps, "optim": args.optim,
        "global_batch_size": args.batch, "micro_batch_size": args.micro,
        "gradient_checkpointing": args.checkpointing,
    }  # fmt: skip
    if args.lora is not None:
        stage["peft"] = {
            "r": args.lora, "target_modules": "all-linear", "frozen_dtype": args.frozen
        }  # fmt: skip
    recipe = {
        "model": {
            "from_config": {
                "model_type": "llama", "hidden_size": shape.hidden,
                "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
                "max_position_embeddings": 32768, "pad_token_id": 0, "eos_token_id": 1,
                "tie_word_embeddings": shape.tied,
            },
            "tokenizer": "./tokenizer",
            "dtype": args.dtype,
        },
        "run_dir": "run",
        "stages": [stage],
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))
    return path


# --- planned ---


def planned(loaded: LoadedRecipe) -> DeviceMemory:
    """Return what `rpo-trainer plan` computes."""
    return plan_recipe(loaded, loaded.base_dir / "run").stages[0].memory


# --- measured ---


class Peaks(TrainerCallback):
    """Records peak memory: before the first step, in forward and backward passes, in optimizer updates.

    On a CPU, the peak of a process cannot be reset, so each is the peak since the start.
    """

    def __init__(self) -> None:
        self.gradients = 0
        self.found = {"reference": 0, "backward": 0, "optimizer": 0}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("optimizer" if state.global_step else "reference")

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        held = [p.grad for p in model.parameters() if p.grad is not None]
        self.gradients = sum(map(size_of, held))
        self._note("backward")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("optimizer")

    def _note(self, name: str) -> None:
        self.found[name] = max(self.found[name], peak_memory())
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()


def measured(loaded: LoadedRecipe) -> tuple[dict[str, int], list[float]]:
    """Return bytes by part, and the losses of the steps."""
    preparer, peaks = StagePreparer(loaded), Peaks()
    (stage,) = preparer.stages
    config = preparer.settings(stage, loaded.base_dir / "run")
    config.logging_steps = 1
    inputs = preparer.prepare(stage)
    for library in ("peft", "bitsandbytes", "torch._dynamo"):  # not part of the plan
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    before = record.memory_now()
    model = start(loaded, preparer.seed(stage), len(preparer.tokenizer))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(stage, config, model, None, preparer.tokenizer, inputs, [peaks])
    trainer.train()
    found = {name: value - before for name, value in peaks.found.items()}
    parts = {
        "weights": sum(map(size_of, [*model.parameters(), *model.buffers()])),
        "gradients": peaks.gradients,
        "optimizer": sum(
            size_of(value)
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
    }
    training = max(found["backward"], found["optimizer"])
    parts["activations"] = training - sum(parts.values())
    parts["in backward"], parts["in optimizer"] = found["backward"], found["optimizer"]
    parts["reference"], parts["peak"] = found["reference"], max(found.values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return parts, losses


def start(loaded: LoadedRecipe, seed: int, vocabulary: int) -> Any:
    """Return the model of the stage, created on the device."""
    spec, (stage,) = loaded.recipe.model, expand_stages(loaded.recipe)
    adapter, dtype = lora_config(stage), frozen_dtype(stage, loaded.recipe.model)
    with torch.device(DEVICE):
        model: Any = load_model(
            spec, loaded.base_dir, seed=seed, vocabulary=vocabulary, dtype=dtype
        )
        return model if adapter is None else with_adapter(model, adapter)


def size_of(tensor: torch.Tensor) -> int:
    """Return the size in bytes."""
    return tensor.numel() * tensor.element_size()


def main() -> None:
    """Print planned and measured memory by part, and the ratio of the peaks."""
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_recipe(write_recipe(args, Path(folder)))
        with quiet():
            found, losses = measured(loaded)
            memory = planned(loaded)
    expected = {name: getattr(memory, name) for name in PARTS}
    ratio = found["peak"] / expected["peak"]
    print(f"{'MiB':12} {'planned':>10} {'measured':>10}")
    for name in PARTS:
        # On a CPU, the reference pass has no separate peak.
        known = name != "reference" or DEVICE == "cuda"
        print(
            f"{name:12} {expected[name] / 2**20:10,.0f} "
            + (f"{found[name] / 2**20:10,.0f}" if known else f"{'':>10}")
        )
    if DEVICE == "cuda":
        print(
            f"measured in forward and backward passes {record.mib(found['in backward'])}, "
            f"in optimizer updates {record.mib(found['in optimizer'])}"
        )
    print(f"measured / planned: {ratio:.3f}   losses {', '.join(f'{x:.4f}' for x in losses)}")
    record.append(args, planned=expected, measured=found, ratio=ratio, losses=losses)


if __name__ == "__main__":
    main()
