"""Data loaders of training and evaluation."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils.data import DataLoader

from rpo_trainer.step.batch import Layout
from rpo_trainer.step.order import GlobalBatches, StepBatchSampler, TokenBudgetSampler
from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.examples import Examples, PackingCollator, StepCollator

logger = logging.getLogger(__name__)


class EpochLoader(DataLoader[Any]):
    """A loader that passes the epoch to its sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the permutation of the next iteration."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


_SAMPLED_STEPS = 100  # of the first epoch, from which the default budget is computed

TrainSampler = StepBatchSampler | TokenBudgetSampler


def train_sampler(
    examples: Examples,
    layout: Layout,
    args: BaseConfig,
    micro_batch_size: int,
    *,
    by_tokens: bool,
    ranks: int,
    rank: int = 0,
) -> TrainSampler:
    """Return the micro-batches of training.

    Args:
        by_tokens: form them by a budget of tokens. If `args.micro_batch_tokens` is None, it is that of the
            most expensive micro-batch of `micro_batch_size` examples, and never takes more forwards.
    """
    settings: dict[str, Any] = {
        "global_batch_size": args.examples_per_step(),
        "world_size": ranks,
        "rank": rank,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "order": "random" if args.shuffle else "data",
        "drop_last": args.dataloader_drop_last,
    }
    sizes = examples.shapes(layout) if layout == "padded" else examples.costs(layout)
    if by_tokens and args.micro_batch_tokens:
        return TokenBudgetSampler(sizes, budget=args.micro_batch_tokens, **settings)
    by_number = StepBatchSampler(sizes, micro_batch_size=micro_batch_size, **settings)
    if not by_tokens:
        return by_number
    budget = default_budget(by_number)
    return TokenBudgetSampler(sizes, budget=budget, micro_batch_size=micro_batch_size, **settings)


def default_budget(by_number: StepBatchSampler) -> int:
    """Return the tokens of the most expensive micro-batch, in 100 steps; at least the longest example."""
    longest = int(by_number.costs.max(initial=1))
    return max(longest, *(int(costs.max()) for costs in by_number.loads(_SAMPLED_STEPS)))


def train_loader(
    examples: Examples,
    args: BaseConfig,
    collate: PackingCollator,
    micro_batch_size: int,
    *,
    log: bool = True,
) -> DataLoader[Any]:
    """Return micro-batches of this rank; with a token budget, entire optimizer steps (`StepCollator`).

    Args:
        log: log a default budget, and a WARNING about examples beyond a budget.
    """
    sampler = train_sampler(
        examples, collate.layout, args, micro_batch_size,
        by_tokens=args.by_tokens, ranks=args.world_size, rank=args.process_index,
    )  # fmt: skip
    if isinstance(sampler, StepBatchSampler):
        return _loader(examples, args, sampler, collate)
    if log and args.process_index == 0:
        _log_budget(sampler)
    return _loader(examples, args, sampler, StepCollator(collate))


def _log_budget(sampler: TokenBudgetSampler) -> None:
    if sampler.micro_batch_size is not None:
        logger.info(
            "micro_batch_tokens: %d, the tokens of the largest micro-batch of %d example%s, because ranks "
            "wait for each other in each micro-batch; 0 turns it off",
            sampler.budget, sampler.micro_batch_size, "s" * (sampler.micro_batch_size > 1),
        )  # fmt: skip
    longer = sampler.costs[sampler.costs > sampler.budget]
    if len(longer):
        logger.warning(
            "%d of %d examples are longer than micro_batch_tokens (%d), the longest has %d tokens: each gets "
            "its own forward pass",
            len(longer), len(sampler.costs), sampler.budget, longer.max(),
        )  # fmt: skip


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
