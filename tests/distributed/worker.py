"""Trains small models under one engine: the process that a launcher starts once per rank.

    python -m tests.distributed.worker ENGINE OUT CASE...

For each case, the first rank writes OUT/CASE.pt: losses by step, final weights, rows by rank. The models are
next to OUT; they are loaded after the engine is selected, so that ZeRO-3 loads only each rank's part.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed import gloo

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
STEPS = 3


def engine_settings(engine: str, **more: Any) -> dict[str, Any]:
    """Training arguments that start an engine on CPUs; `more` are FSDP's own settings."""
    if engine in ("none", "ddp"):
        return {"use_cpu": True}
    if engine == "fsdp2":
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {"fsdp": True, "fsdp_config": config | more}
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": int(engine[-1]),
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
    }


def trainer_of(engine: str, case: dict[str, Any], out: Path) -> Any:
    """The trainer of a case; the global batch is the same for every world size."""
    from rpo_trainer.data.quickstart import character_tokenizer
    from rpo_trainer.trainers import RewardTrainer
    from tests.trainers.conftest import TRAINERS

    kind, world = case["kind"], int(os.environ.get("WORLD_SIZE", 1))
    accumulation, models = case.get("accumulation", 1), out.parent.parent
    trainer, batch = {**TRAINERS, "reward": RewardTrainer}[kind], 4 * accumulation
    extra: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if kind == "reward":
        extra |= {"objective": "regression", "attributes": ("quality", "depth")}
    elif kind != "sft":
        extra |= {"beta": 0.3, "sft_loss_weight": 0.1}
        # An odd number of several forwards in the reference pass.
        extra |= {"reference_cache_dir": str(out / "reference"), "reference_batch_tokens": 60}
        given["ref_model"] = str(models / "other") if case.get("other_reference") else None
    if "lora" in case:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(**case["lora"])
    args = trainer.config_class(
        **{
            "output_dir": str(out / "run"), "max_steps": STEPS, "global_batch_size": batch,
            "per_device_train_batch_size": 4 // world, "per_device_eval_batch_size": 2,
            "learning_rate": 1e-2, "lr_scheduler_type": "linear", "optim": "adamw_torch",
            "adam_epsilon": 1e-3, "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no",
            "activation_checkpointing": case.get("checkpointing", False), "report_to": "none",
            "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": STEPS,
            "eval_on_start": True, **extra, **engine_settings(engine, **case.get("fsdp", {})),
            **case.get("settings", {}),
        }
    )  # fmt: skip
    rows = num_rows(kind, batch)
    return trainer(
        model=str(
            models / ("moe" if case.get("moe") else "tied" if case.get("tied") else "untied")
        ),
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:5],
        processing_class=character_tokenizer(),
        **given,
    )


def num_rows(kind: str, batch: int) -> list[dict[str, Any]]:
    """Two global batches and two more rows: with accumulation, some of the last forwards are fillers."""
    from tests.trainers.plain import make_rows

    ks = (2,) if kind == "dpo" else (2, 3) if kind == "rpo" else (1,)
    rows = make_rows(1, (ks * batch)[:batch] * 2 + ks[:1] * 2, spans=kind == "sft", rewards=True)
    if kind == "reward":
        for number, row in enumerate(rows):  # some of them have no ratings
            row["attributes"] = [number % 5, None if number % 3 == 0 else number % 4]
    return rows


@contextlib.contextmanager
def counted_offloads() -> Iterator[list[None]]:
    """Count the layers whose activations transformers offloads; pinned memory is used on a GPU only."""
    from transformers import modeling_utils

    own, done = modeling_utils.save_on_cpu, []

    def save_on_cpu(*, pin_memory: bool, **settings: Any) -> Any:
        done.append(None)
        return own(pin_memory=False, **settings)

    with mock.patch.object(modeling_utils, "save_on_cpu", save_on_cpu):
        yield done


def optimizer_dtypes(trainer: Any) -> set[str]:
    """Dtypes of the weights that the innermost optimizer updates, and of its moments."""
    inner = trainer.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    moments = [t for state in inner.state.values() for t in state.values() if hasattr(t, "dtype")]
    return {str(tensor.dtype) for tensor in [*inner.state, *moments]}


def train(engine: str, case: dict[str, Any], out: Path) -> dict[str, Any]:
    import torch

    from rpo_trainer.models.sharding import full_state_dict
    from rpo_trainer.runtime.distributed import all_gather_dict, rank, world_size
    from rpo_trainer.trainers.engine import engine_name

    trainer = trainer_of(engine, case, out)
    seen: dict[tuple[int, int], list[str]] = {}
    forwards = [0] * STEPS
    own = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("num_items_in_batch") is not None:
            forwards[trainer.state.global_step] += 1
            if inputs.weights.any():
                rows = seen.setdefault((rank(), trainer.state.global_step), [])
                rows += inputs.ids
        return own(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    start = full_state_dict(trainer.model, keep=True) if world_size() == 1 else None
    with counted_offloads() as offloads:
        trainer.train()
    history = trainer.state.log_history
    return {
        "engine": engine_name(trainer.accelerator),
        "world_size": world_size(),
        "losses": [line for line in history if "loss" in line],
        "evaluations": [line for line in history if "eval_loss" in line],
        "seen": all_gather_dict(seen),
        "forwards": forwards,
        "by_tokens": trainer.args.by_tokens,
        "weights": full_state_dict(trainer.model, keep=rank() == 0, trained_only="lora" in case),
        "start": start,
        "offloads": len(offloads),
        "optimizer_dtypes": optimizer_dtypes(trainer),
        "step_zero": getattr(trainer, "step_zero", None),
        "references": _references(out),
        "torch": torch.__version__,
    }


def _references(out: Path) -> dict[Any, float]:
    """The reference log-probs on disk."""
    from rpo_trainer.step.reference_cache import ReferenceCache

    found: dict[Any, float] = {}
    for folder in sorted((out / "reference").glob("*")):
        found |= {(folder.name, key): value for key, value in ReferenceCache(folder).items()}
    return found


def harm(engine: str, case: dict[str, Any], out: Path) -> dict[str, Any]:
    """The second step's loss or gradient is not finite, on the second rank only."""
    from transformers import TrainerCallback

    from rpo_trainer.errors import NonFiniteError
    from rpo_trainer.models.sharding import full_state_dict
    from rpo_trainer.runtime.distributed import all_gather_dict, rank

    trainer = trainer_of(engine, case, out)
    own = trainer.losses
    weights: list[dict[str, Any]] = []

    def losses(sums: Any, batch: Any) -> Any:
        result = own(sums, batch)
        if rank() == 1 and trainer.state.global_step == 1 and trainer.model.training:
            term = next(iter(result.terms.values()))
            if case["harm"] == "loss":
                term.numerators = term.numerators * float("inf")
            else:  # 0, with a gradient of NaN
                term.numerators = (
                    term.numerators + (term.numerators - term.numerators.detach()).abs().sqrt()
                )
        return result

    class Remember(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            whole = full_state_dict(trainer.model, keep=rank() == 0)
            weights.append({name: tensor.clone() for name, tensor in whole.items()})

    trainer.losses = losses
    trainer.add_callback(Remember())
    error = None
    try:
        trainer.train()
    except NonFiniteError as raised:
        error = str(raised)
    return {
        "errors": all_gather_dict({rank(): error}),
        "skipped": all_gather_dict({rank(): trainer.step_guard.skipped}),
        "weights": weights,
        "after": full_state_dict(trainer.model, keep=rank() == 0),
    }


def save_late(engine: str, case: dict[str, Any], out: Path) -> dict[str, Any]:
    """The second rank is slow to write its part of a checkpoint; each rank hashes its own part."""
    from rpo_trainer.runtime.distributed import all_gather_dict, rank
    from rpo_trainer.trainers import checkpoint, manifest

    trainer = trainer_of(engine, case, out)
    own, own_digest = trainer._save_rng_state, manifest.file_digest
    hashed: list[str] = []

    def save_rng_state(folder: str) -> None:
        time.sleep(rank())
        own(folder)

    def digest(path: Path) -> str:
        hashed.append(path.as_posix().partition(f"checkpoint-{STEPS}/")[2])
        return own_digest(path)

    trainer._save_rng_state = save_rng_state
    with mock.patch.object(manifest, "file_digest", digest):
        trainer.train()
    folder = out / "run" / f"checkpoint-{STEPS}"
    files = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
    return {
        "damage": checkpoint.verify_manifest(folder, content=True),
        "sizes": {name: entry["size"] for name, entry in files.items()},
        "hashed": all_gather_dict({rank(): sorted(hashed)}),
    }


def load_best(engine: str, case: dict[str, Any], out: Path) -> dict[str, Any]:
    """Every step makes the metric worse; at the end every rank has the best weights again."""
    trainer = trainer_of(engine, case, out)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line and line["step"]]
    return {
        "losses": {line["step"]: line["eval_loss"] for line in lines},
        "best": trainer.state.best_model_checkpoint,
        "again": trainer.evaluate()["eval_loss"],
    }


def main(engine: str, out: Path, *cases: str) -> None:
    gloo.allow()
    import torch

    torch.set_num_threads(1)
    logging.getLogger("rpo_trainer").setLevel(logging.ERROR)
    from rpo_trainer.runtime import distributed

    for name in cases:
        case = json.loads(name)
        folder = out / case["name"]
        own = save_late if case.get("late") else load_best if case.get("best") else None
        do = own or (harm if "harm" in case else train)
        result = do(engine, case, folder)
        if distributed.is_main():
            torch.save(result, folder.with_suffix(".pt"))
    distributed.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
