"""Checks of the fields of a `BaseConfig`.

The settings of transformers and accelerate are checked by `argument_checks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

from transformers.trainer_utils import HubStrategy

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe.template_kwargs import faults
from rpo_trainer.step.batch import Layout
from rpo_trainer.trainers.argument_checks import setting_problems
from rpo_trainer.trainers.argument_status import Problem
from rpo_trainer.trainers.engine import requests_deepspeed, requests_sharding

_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile


def config_problems(args: Any) -> Iterator[Problem]:
    """Yield a problem for each invalid value of a `BaseConfig`."""
    yield from setting_problems(args)
    if args.shuffle and args.train_sampling_strategy == "sequential":
        yield Problem(
            "shuffle=True and train_sampling_strategy='sequential' conflict: remove one",
            code="training.conflicting-settings",
            setting="train_sampling_strategy",
        )
    if args.truncation not in ("drop", "truncate"):
        yield Problem(
            f"truncation must be drop or truncate, got {args.truncation!r}",
            code="training.invalid-value",
            setting="truncation",
        )
    if args.special_tokens not in (None, "text", "parse"):
        yield Problem(
            f"special_tokens must be text or parse, got {args.special_tokens!r}",
            code="training.invalid-value",
            setting="special_tokens",
        )
    for fault in faults(args.chat_template_kwargs):
        yield Problem(fault, code="training.invalid-value", setting="chat_template_kwargs")
    if args.layout not in ("auto", *get_args(Layout)):
        names = ", ".join(get_args(Layout))
        yield Problem(
            f"layout must be auto or one of {names}, got {args.layout!r}",
            code="training.invalid-value",
            setting="layout",
        )
    if args.max_length is not None and args.max_length < 2:
        yield Problem(
            f"max_length must be 2 or more, got {args.max_length}",
            code="training.invalid-value",
            setting="max_length",
        )
    if args.micro_batch_tokens is not None and args.micro_batch_tokens < 0:
        yield Problem(
            f"micro_batch_tokens must be 0 or more, got {args.micro_batch_tokens}",
            code="training.invalid-value",
            setting="micro_batch_tokens",
        )
    if (
        args.micro_batch_tokens
        and args.global_batch_size is not None
        and args.global_batch_size < 1
    ):
        yield Problem(
            f"global_batch_size must be positive, got {args.global_batch_size}",
            code="training.invalid-value",
            setting="global_batch_size",
        )
    yield from _nonfinite_problems(args)
    yield from _async_save_problems(args)
    if (coefficient := args.router_aux_loss_coef) is not None and not (
        math.isfinite(coefficient) and coefficient >= 0
    ):
        yield Problem(
            f"router_aux_loss_coef must be 0 or more, got {coefficient}",
            code="training.invalid-value",
            setting="router_aux_loss_coef",
        )
    if args.logits_chunk_bytes < 1:
        yield Problem(
            f"logits_chunk_bytes must be positive, got {args.logits_chunk_bytes}",
            code="training.invalid-value",
            setting="logits_chunk_bytes",
        )
    if args.torch_compile_mode in _CUDA_GRAPHS:
        yield Problem(
            f"torch_compile_mode {args.torch_compile_mode} records a CUDA graph for each length of "
            "a row, and lengths vary: remove it, or use max-autotune-no-cudagraphs",
            code="training.unsupported-setting",
            setting="torch_compile_mode",
        )


def noise_problems(args: Any, why: str) -> Iterator[Problem]:
    """Yield a problem if NEFTune noise is set, which only SFT supports.

    Args:
        why: the reason.
    """
    if args.neftune_noise_alpha is not None:
        yield Problem(
            f"neftune_noise_alpha is only for SFT ({why}): remove it",
            code="training.unsupported-setting",
            setting="neftune_noise_alpha",
        )


def _nonfinite_problems(args: Any) -> Iterator[Problem]:
    """Yield the problems of on_nonfinite; at most one, because each makes the next ones meaningless."""
    if args.on_nonfinite not in ("stop", "skip"):
        yield Problem(
            f"on_nonfinite must be stop or skip, got {args.on_nonfinite!r}",
            code="training.invalid-value",
            setting="on_nonfinite",
        )
    elif args.on_nonfinite == "stop":
        if args.max_skipped_steps is not None:
            yield Problem(
                f"max_skipped_steps={args.max_skipped_steps} has no effect with on_nonfinite=stop, which "
                "ends the run at the first such step: set on_nonfinite=skip, or remove it",
                code="training.no-effect",
                setting="max_skipped_steps",
            )
    elif args.allowed_skips < 1:
        yield Problem(
            f"max_skipped_steps must be 1 or more, got {args.max_skipped_steps}",
            code="training.invalid-value",
            setting="max_skipped_steps",
        )
    elif requests_deepspeed({"deepspeed": args.deepspeed}):
        yield Problem(
            "on_nonfinite=skip does not work with DeepSpeed, which updates the weights within the backward "
            "pass: use stop, or DDP or FSDP2",
            code="training.unsupported-setting",
            setting="on_nonfinite",
        )
    elif args.fp16 and not args.max_grad_norm:
        yield Problem(
            "on_nonfinite=skip with float16 requires max_grad_norm above 0: the loss scaler checks the "
            "gradient when it is clipped",
            code="training.conflicting-settings",
            setting="max_grad_norm",
        )


def _async_save_problems(args: Any) -> Iterator[Problem]:
    """Yield the problems of async_save."""
    if not args.async_save:
        return
    if requests_sharding({"deepspeed": args.deepspeed, "fsdp": args.fsdp}):
        yield Problem(
            "async_save does not work with FSDP and DeepSpeed, whose ranks write their shards together: "
            "remove it, or use DDP",
            code="training.unsupported-setting",
            setting="async_save",
        )
    if args.push_to_hub and args.hub_strategy != HubStrategy.END:
        yield Problem(
            f"async_save conflicts with hub_strategy {args.hub_strategy.value}, which pushes each checkpoint "
            "when it is saved: set hub_strategy=end",
            code="training.conflicting-settings",
            setting="async_save",
        )


def accumulation_of(batch: int, per_device: int, ranks: int, where: str) -> int:
    """Return the number of forward passes per rank and optimizer step.

    Raises:
        RecipeError: the global batch size is not a multiple of ranks × `per_device`.
    """
    micro = ranks * per_device
    if batch < 1 or batch % micro:
        nearest = sorted({max(micro, batch // micro * micro), (batch // micro + 1) * micro})
        smaller = [m for m in range(per_device, 0, -1) if batch > 0 and not batch % (ranks * m)]
        size = f"a micro-batch size of {smaller[0]}" if smaller else "another number of ranks"
        raise RecipeError(
            f"global_batch_size {batch} is not a multiple of {ranks} rank{'s' * (ranks > 1)} × "
            f"{per_device} examples per micro-batch",
            code="training.indivisible-batch",
            where=where,
            why="each micro-batch of each rank has the same number of examples",
            fix=f"use {' or '.join(map(str, nearest))}, or {size}",
        )
    return batch // micro
