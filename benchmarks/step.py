"""A preference step: ours against TRL's DPOTrainer, alternating in one process, on the same pairs.

    python benchmarks/step.py                          # (256, 128), K = 2
    python benchmarks/step.py --prompt 1024 --response 256
    python benchmarks/step.py --k 4                    # TRL gets the pairs: best against each other one
    python benchmarks/step.py --lengths pairs.jsonl    # lengths of real rows
    python benchmarks/step.py --memory                 # peak memory, one process each

Both read cached reference log-probs; TRL pads, which is its only way for DPO at present.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import (
    Row,
    StepTimes,
    alternate,
    lengths_of,
    make_model,
    make_rows,
    make_tokenizer,
    matmul_flops,
    quiet,
    ratios,
    scratch,
    step_flops,
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="42m")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--batch", type=int, default=4, help="prompts of one optimizer step")
    parser.add_argument("--micro", type=int, default=4, help="prompts of one forward")
    parser.add_argument("--steps", type=int, default=3, help="steps of one round, warm-up included")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", choices=("ours", "trl"), help=argparse.SUPPRESS)
    return parser.parse_args()


def common_settings(args: argparse.Namespace, *, micro: int, accumulation: int) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": scratch(),
        "max_steps": args.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "beta": 0.1,
        "max_length": None,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
    }


def ours(
    args: argparse.Namespace, model: Any, tokenizer: Any, rows: list[Row]
) -> tuple[Any, StepTimes]:
    """Our trainer: DPO for pairs, RPO for K responses."""
    from rpo_trainer import DPOConfig, DPOTrainer, RPOConfig, RPOTrainer

    data = [
        {
            "id": str(i),
            "source": "bench",
            "prompt_ids": row.prompt,
            "response_ids": row.responses,
            "response_mask": [[1] * len(r) for r in row.responses],
            "rewards": [float(args.k - k) for k in range(args.k)],
        }
        for i, row in enumerate(rows)
    ]
    trainer_class, config_class = (
        (DPOTrainer, DPOConfig) if args.k == 2 else (RPOTrainer, RPOConfig)
    )
    times = StepTimes()
    settings = common_settings(args, micro=args.micro, accumulation=args.batch // args.micro)
    trainer = trainer_class(
        model=model,
        args=config_class(**settings),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[times],
    )
    return trainer, times


def trl(
    args: argparse.Namespace, model: Any, tokenizer: Any, rows: list[Row]
) -> tuple[Any, StepTimes]:
    """TRL's trainer on the same pairs; K responses become K − 1 pairs with the best."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids)

    pairs = [
        {
            "prompt": text(row.prompt) + " ",
            "chosen": text(row.responses[0][:-1]),
            "rejected": text(other[:-1]),
        }
        for row in rows
        for other in row.responses[1:]
    ]
    each = args.k - 1
    times = StepTimes()
    settings = common_settings(args, micro=args.micro * each, accumulation=args.batch // args.micro)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**settings, precompute_ref_log_probs=True),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=[times],
    )
    return trainer, times


def build(args: argparse.Namespace, name: str) -> tuple[Any, StepTimes]:
    """A trainer by name with a model of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(args.size, args.vocabulary, dtype=getattr(torch, args.dtype), device=device)
    with quiet():
        return {"ours": ours, "trl": trl}[name](
            args, model, make_tokenizer(args.vocabulary), rows_of(args)
        )


def rows_of(args: argparse.Namespace) -> list[Row]:
    """The prompts of one optimizer step, the same at every step: the work of each is the same."""
    lengths = [(args.prompt, [args.response] * args.k)]
    if args.lengths:
        lengths = lengths_of(args.lengths, args.batch * 4)
    return make_rows(args.batch, lengths, args.vocabulary)


def compare(args: argparse.Namespace) -> None:
    """Times both and prints the ratio, and our share of a matrix product's speed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = matmul_flops(device, getattr(torch, args.dtype))
    seconds = alternate({name: build(args, name) for name in ("ours", "trl")}, args.rounds)
    middle, low, high = ratios(seconds, "ours", "trl")
    rows = rows_of(args)
    for name, values in seconds.items():
        best = sorted(values)[len(values) // 2]
        print(f"{name:5} {best:8.3f} s a step   {len(rows) / best:8.3f} prompts a second")
    flops = step_flops(rows, args.size, args.vocabulary)
    mine = sorted(seconds["ours"])[len(seconds["ours"]) // 2]
    again = matmul_flops(device, getattr(torch, args.dtype))
    print(f"ratio {middle:.2f} (from {low:.2f} to {high:.2f} over {len(seconds['ours'])} steps)")
    print(
        f"model FLOPs utilisation, ours: {flops / mine / max(peak, again):.0%} of a matrix product"
    )


def memory(args: argparse.Namespace) -> None:
    """Peak memory of each in a process of its own."""
    found = {}
    for name in ("ours", "trl"):
        command = [sys.executable, *sys.argv, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(done.stdout.split()[-1])
        print(f"{name:5} {found[name] / 2**20:9.0f} MiB peak")
    print(f"ratio {found['ours'] / found['trl']:.2f}")


def one(args: argparse.Namespace) -> None:
    """Trains one of them and prints the peak in bytes."""
    trainer, _ = build(args, args.only)
    with quiet():
        trainer.train()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    given = arguments()
    if given.only:
        one(given)
    elif given.memory:
        memory(given)
    else:
        compare(given)
