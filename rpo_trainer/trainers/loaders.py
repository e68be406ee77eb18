"""Data loaders of training and evaluation."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils.data import DataLoader

from rpo_trainer.step.order import GlobalBatches, StepBatchSampler, TokenBudgetSampler
from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.examples import Examples, PackingCollator, StepCollator

logger = logging.getLogger(__name__)


class EpochLoader(DataLoader[Any]):
    """A loader that passes the epoch to its sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the permutation of the next iteration."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def train_loader(
    examples: Examples, args: BaseConfig, collate: PackingCollator, micro_batch_size: int
) -> DataLoader[Any]:
    """Return micro-batches of this rank; with a token budget, entire optimizer steps (`StepCollator`)."""
    settings: dict[str, Any] = {
        "world_size": args.world_size,
        "rank": args.process_index,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "order": "random" if args.shuffle else "data",
        "drop_last": args.dataloader_drop_last,
    }
    if args.micro_batch_tokens is None:
        sampler = StepBatchSampler(
            examples.costs(collate.layout).tolist(),
            global_batch_size=micro_batch_size * args.gradient_accumulation_steps * args.world_size,
            micro_batch_size=micro_batch_size,
            **settings,
        )
        return _loader(examples, args, sampler, collate)
    shapes = examples.shapes(collate.layout).tolist()
    longer = [cost for rows, length in shapes if (cost := rows * length) > args.micro_batch_tokens]
    if longer and args.process_index == 0:
        logger.warning(
            "%d of %d examples are longer than micro_batch_tokens (%d), the longest has %d tokens: each gets "
            "its own forward pass",
            len(longer), len(shapes), args.micro_batch_tokens, max(longer),
        )  # fmt: skip
    steps = TokenBudgetSampler(
        shapes,
        budget=args.micro_batch_tokens,
        global_batch_size=args.examples_per_step(),
        **settings,
    )
    return _loader(examples, args, steps, StepCollator(collate))


def eval_loader(examples: Examples, args: BaseConfig, collate: PackingCollator) -> DataLoader[Any]:
    """Return micro-batches of this rank, longest first."""
    sampler = StepBatchSampler(
        examples.costs(collate.layout).tolist(),
        global_batch_size=args.eval_batch_size * args.world_size,
        micro_batch_size=args.eval_batch_size,
        world_size=args.world_size,
        rank=args.process_index,
        order="longest",
    )
    return _loader(examples, args, sampler, collate)


def _loader(
    examples: Examples,
    args: BaseConfig,
    sampler: GlobalBatches,
    collate: PackingCollator | StepCollator,
) -> DataLoader[Any]:
    return EpochLoader(
        examples,
        batch_sampler=sampler,  # type: ignore[arg-type]  # any iterable of batches
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
