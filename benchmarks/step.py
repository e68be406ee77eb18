"""A preference step: ours against TRL's DPOTrainer, alternating in one process, on the same pairs.

    python benchmarks/step.py                          # (256, 128), K = 2
    python benchmarks/step.py --prompt 1024 --response 256 --batch 2 --micro 2
    python benchmarks/step.py --k 4                    # TRL gets the pairs: best against each other one
    python benchmarks/step.py --lengths benchmarks/ultrafeedback.csv
    python benchmarks/step.py --peers ours-compiled    # torch_compile on against off
    python benchmarks/step.py --memory                 # peak memory, one process each

Both read cached reference log-probs. `trl` is its fastest setting here: fused head (it has no other), the
attention that transformers picks (`sdpa`), no checkpointing, and rows of like length together where a step
has several forwards; it pads, its only way for DPO at present. `trl-plain` is the same without the grouping.
`trl-default` is TRL as it comes, other work too: a reference model in every step, gradient checkpointing.
`ours-compiled` is ours with `torch_compile`; a ratio below 1 says that compiling helps.
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
    """The command line."""
    parser = duel.duel_parser(__doc__, ["trl", "trl-plain", "trl-default", "ours-compiled"])
    parser.set_defaults(peers=["trl"])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--lengths", type=Path, help="CSV or JSONL of real pairs, see common.py")
    parser.add_argument("--layout", default="auto", help="of ours: shared, packed, padded, single")
    return parser.parse_args(words)


def rows_of(args: argparse.Namespace) -> list[Row]:
    """The prompts of one optimizer step, the same at every step: the work of each is the same."""
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
    """Our trainer: DPO for pairs, RPO for K responses."""
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
    """Our trainer with its layers compiled."""
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
    """TRL's trainer on the same pairs; K responses become K − 1 pairs with the best."""
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
        # Off, or transformers drops the column of lengths before its sampler looks for it.
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
    """TRL in the order that its sampler draws."""
    return trl(args, model, tokenizer, callbacks, grouped=False)


def trl_default(args: argparse.Namespace, model: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    """TRL's defaults, but for what all are told."""
    return trl(args, model, tokenizer, callbacks, grouped=False, cached=False)


BUILDERS: dict[str, duel.Builder] = {
    "ours": ours,
    "trl": trl,
    "trl-plain": trl_plain,
    "trl-default": trl_default,
    "ours-compiled": ours_compiled,
}


def work(args: argparse.Namespace) -> duel.Work:
    """One step's prompts and FLOPs."""
    rows = rows_of(args)
    return duel.Work(len(rows), "prompts", step_flops(rows, args.size, args.vocabulary))


if __name__ == "__main__":
    given = arguments()
    duel.run(given, BUILDERS, work(given))
