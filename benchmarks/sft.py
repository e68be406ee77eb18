"""Compares an SFT step with TRL's SFTTrainer, alternating in one process, on the same rows.

    python benchmarks/sft.py                           # documents of about 128 + 256 tokens
    python benchmarks/sft.py --row 1024                # TRL's packed rows at its default length
    python benchmarks/sft.py --memory                  # peak memory, in a process per trainer

All use completion-only loss. `trl-packed` is TRL with `packing=True`: best-fit bins of `--row` tokens, one
per forward pass, by default as long as our forward pass. Without flash attention, transformers keeps its
documents apart by a dense mask over the row, derived from the position ids. `trl-padded` pads `--micro`
rows of similar length. The ratio is to the faster of them. Equal losses show that all do the same work.
"""

from __future__ import annotations

import argparse
from typing import Any

import duel
from common import Row, make_rows, step_flops

MIB = 2**20


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = duel.duel_parser(__doc__, ["trl-packed", "trl-padded"])
    parser.set_defaults(batch=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens per row without loss")
    parser.add_argument("--response", type=int, default=256, help="tokens per row with loss")
    parser.add_argument("--row", type=int, help="tokens per packed row of TRL")
    args = parser.parse_args()
    if args.row is None:
        longest = max(len(row.prompt) + len(row.responses[0]) for row in rows_of(args))
        args.row = max(longest, args.micro * (args.prompt + args.response))
    return args


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Return the documents of an optimizer step, the same in every step."""
    return make_rows(args.batch, [(args.prompt, [args.response])], args.vocabulary)


def ours(args: argparse.Namespace, model: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    """Build rpo-trainer's trainer."""
    from rpo_trainer import SFTConfig, SFTTrainer

    settings = duel.settings(args, micro=args.micro, accumulation=duel.accumulation_of(args))
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings, max_length=None, logits_chunk_bytes=args.tile_mib * MIB),
        train_dataset=[row.example(i) for i, row in enumerate(rows_of(args))],
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _tokens(args: argparse.Namespace) -> Any:
    """Return the rows in TRL's tokenized format."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "input_ids": row.prompt + row.responses[0],
                "completion_mask": [0] * len(row.prompt) + [1] * len(row.responses[0]),
            }
            for row in rows_of(args)
        ]
    )


def trl_packed(args: argparse.Namespace, model: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    """Build TRL's trainer with packing: a forward pass for each bin."""
    from trl import SFTConfig, SFTTrainer, pack_dataset

    data = _tokens(args)
    longest = max(map(len, data["input_ids"]))
    if longest > args.row:
        raise SystemExit(f"--row {args.row} would truncate a document of {longest} tokens")
    bins = len(pack_dataset(data.select_columns("input_ids"), args.row, "bfd"))
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            **duel.settings(args, micro=1, accumulation=bins),
            max_length=args.row, packing=True, completion_only_loss=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip


def trl_padded(args: argparse.Namespace, model: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    """Build TRL's trainer with padding, grouped by length."""
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(
            **duel.settings(args, micro=args.micro, accumulation=duel.accumulation_of(args)),
            max_length=None, completion_only_loss=True, train_sampling_strategy="group_by_length",
        ),
        train_dataset=_tokens(args),
        processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip


BUILDERS: dict[str, duel.Builder] = {
    "ours": ours,
    "trl-packed": trl_packed,
    "trl-padded": trl_padded,
}


def work(args: argparse.Namespace) -> duel.Work:
    """Return the tokens and FLOPs of a step."""
    rows = rows_of(args)
    tokens = sum(len(row.prompt) + len(row.responses[0]) for row in rows)
    return duel.Work(tokens, "tokens", step_flops(rows, args.size, args.vocabulary))


if __name__ == "__main__":
    given = arguments()
    duel.run(given, BUILDERS, work(given))
