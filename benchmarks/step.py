"""Compares a preference step with TRL's DPOTrainer, alternating in one process, on the same pairs.

    python benchmarks/step.py                          # 256 + 128 tokens, K = 2
    python benchmarks/step.py --prompt 1024 --response 256 --batch 2 --micro 2
    python benchmarks/step.py --k 4                    # TRL gets pairs of the best and each other response
    python benchmarks/step.py --lengths benchmarks/ultrafeedback.csv
    python benchmarks/step.py --peers ours-compiled    # with and without torch_compile
    python benchmarks/step.py --memory                 # peak memory, in a process per trainer

Both use cached reference log-probs. `trl` is TRL's fastest setting here: fused head (it has no other), the
attention that transformers selects (`sdpa`), no gradient checkpointing, and rows grouped by length if a
step has several forward passes; it pads, its only option for DPO. `trl-plain` is the same without grouping.
`trl-default` is TRL with its defaults, which do more work: a reference forward pass in every step, gradient
checkpointing. `ours-compiled` is ours with `torch_compile`; a ratio below 1 means that compiling helps.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import duel
from common import Row, lengths_of, make_rows, step_flops

MIB = 2**20


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = duel.duel_parser(__doc__, ["trl", "trl-plain", "trl-default", "ours-compiled"])
    parser.set_defaults(peers=["trl"])
    parser.add_argument("--prompt", type=int, default=256, help="tokens per prompt")
    parser.add_argument("--response", type=int, default=128, help="tokens per response")
    parser.add_argument("--k", type=int, default=2, help="responses per prompt")
    parser.add_argument("--lengths", type=Path, help="CSV or JSONL of real pairs; see common.py")
    parser.add_argument(
        "--layout", default="auto", help="our step layout: shared, packed, padded, single"
    )
    return parser.parse_args(words)


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Return the rows of an optimizer step, the same in every step."""
    if args.lengths:
        lengths = lengths_of(args.lengths, args.batch, args.k)
        return make_rows(args.batch, lengths, args.vocabulary, jitter=0.0)
    return make_rows(args.batch, [(args.prompt, [args.response] * args.k)], args.vocabulary)


def ours(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    callbacks: list[Any],
    *,
    compiled: bool = False,
) -> Any:
    """Build rpo-trainer's trainer: DPO for pairs, RPO for K responses."""
    from rpo_trainer import DPOConfig, DPOTrainer, RPOConfig, RPOTrainer

    pairs = args.k == 2
    trainer_class, config_class = (DPOTrainer, DPOConfig) if pairs else (RPOTrainer, RPOConfig)
    settings = duel.settings(args, micro=args.micro, accumulation=duel.accumulation_of(args))
    return trainer_class(
        model=model,
        args=config_class(
            **settings, beta=0.1, max_length=None, layout=args.layout,
            logits_chunk_bytes=args.tile_mib * MIB, torch_compile=compiled,
        ),
        train_dataset=[row.example(i) for i, row in enumerate(rows_of(args))],
        processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip


def ours_compiled(
    args: argparse.Namespace, model: Any, tokenizer: Any, callbacks: list[Any]
) -> Any:
    """Build rpo-trainer's trainer with compiled layers."""
    return ours(args, model, tokenizer, callbacks, compiled=True)


def trl(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    callbacks: list[Any],
    *,
    grouped: bool = True,
    cached: bool = True,
) -> Any:
    """Build TRL's trainer on the same pairs; K responses become K − 1 pairs with the best one."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    each = args.k - 1
    pairs = [
        {
            "prompt": tokenizer.decode(row.prompt) + " ",
            "chosen": tokenizer.decode(row.responses[0][:-1]),
            "rejected": tokenizer.decode(other[:-1]),
            "length": len(row.prompt) + max(len(row.responses[0]), len(other)),
        }
        for row in rows_of(args)
        for other in row.responses[1:]
    ]
    settings = duel.settings(args, micro=args.micro * each, accumulation=duel.accumulation_of(args))
    if grouped:
        # Otherwise transformers removes the length column before its sampler uses it.
        settings |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    if not cached:
        settings["gradient_checkpointing"] = True
    return DPOTrainer(
        model=model,
        ref_model=None if cached else copy.deepcopy(model),
        args=DPOConfig(**settings, beta=0.1, max_length=None, precompute_ref_log_probs=cached),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def trl_plain(args: argparse.Namespace, model: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    """Build TRL's trainer with random order."""
    return trl(args, model, tokenizer, callbacks, grouped=False)


def trl_default(args: argparse.Namespace, model: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    """Build TRL's trainer with its defaults, except for the common settings."""
    return trl(args, model, tokenizer, callbacks, grouped=False, cached=False)


BUILDERS: dict[str, duel.Builder] = {
    "ours": ours,
    "trl": trl,
    "trl-plain": trl_plain,
    "trl-default": trl_default,
    "ours-compiled": ours_compiled,
}


def work(args: argparse.Namespace) -> duel.Work:
    """Return the prompts and FLOPs of a step."""
    rows = rows_of(args)
    return duel.Work(len(rows), "prompts", step_flops(rows, args.size, args.vocabulary))


if __name__ == "__main__":
    given = arguments()
    duel.run(given, BUILDERS, work(given))
