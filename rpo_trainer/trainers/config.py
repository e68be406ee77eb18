"""What a trainer can be told, beside all of `transformers.TrainingArguments`."""

from __future__ import annotations

import functools
import inspect
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from transformers import TrainingArguments

from rpo_trainer.errors import RecipeError
from rpo_trainer.logprobs import DEFAULT_TILE_BYTES
from rpo_trainer.losses import REWARD_LOSSES
from rpo_trainer.trainers.engine import asks_for_deepspeed, load_in_float32
from rpo_trainer.trainers.guards import skips_allowed
from rpo_trainer.trainers.names import instead_of

C = TypeVar("C", bound=TrainingArguments)

_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


def _config(config: type[C]) -> type[C]:
    """The class, which has the help of its fields in its docstring, and answers unknown arguments."""
    config.__doc__ = _with_fields(config)
    made = config.__init__
    known = list(inspect.signature(made).parameters)

    @functools.wraps(made)
    def init(self: C, *args: Any, **given: Any) -> None:
        unknown = [name for name in given if name not in known]
        if unknown:
            raise RecipeError(
                f"there is no argument {' or '.join(unknown)}",
                where=config.__name__,
                why="nothing reads it: it would be ignored in silence",
                fix="; ".join(instead_of(name, known) for name in unknown),
            )
        made(self, *args, **given)

    config.__init__ = init  # type: ignore[assignment, method-assign]
    return config


def _with_fields(config: type[C]) -> str:
    """The docstring of a config and the help of its own fields: what `help()` and other tools show."""
    foreign = {field.name: field for field in fields(TrainingArguments)}
    lines = [
        textwrap.fill(
            f"{own.name} ({own.type}, {own.default!r}): {own.metadata['help']}",
            width=100, initial_indent="    ", subsequent_indent="        ",
            break_on_hyphens=False,
        )
        for own in fields(config)
        if foreign.get(own.name) is not own
    ]  # fmt: skip
    head = "Args, beside those of transformers.TrainingArguments, each with its default:"
    return "\n".join([f"{config.__doc__}\n", head, *lines])


@_config
@dataclass
class StepConfig(TrainingArguments):
    """Fields that all our trainers share."""

    max_length: int | None = _help("Longest prompt + response, in tokens; None: no limit.", 1024)
    truncation: str = _help(
        "What becomes of longer rows: `drop` or `cut` (responses lose their end).", "drop"
    )
    special_tokens: str | None = _help(
        "What the text of special tokens in the rows stands for: `text` (letters) or `parse` (the "
        "tokens, for rows that went through a chat template before). None: `text`, with a warning.",
        None,
    )
    global_batch_size: int | None = _help(
        "Examples of one optimizer step over all ranks; accumulation follows from it. None: "
        "per_device_train_batch_size × gradient_accumulation_steps × ranks.",
        None,
    )
    micro_batch_tokens: int | None = _help(
        "Tokens of one training forward, in place of per_device_train_batch_size: each global batch "
        "is dealt into as many forwards as its lengths need. A longer example goes alone.",
        None,
    )
    layout: str = _help(
        "How responses lie in a row: `shared` (each prompt once), `packed`, `padded`, or `auto`: the "
        "first of them that agrees with the model's plain forward.",
        "auto",
    )
    tile_bytes: int = _help("Most memory for one tile of logits, in bytes.", DEFAULT_TILE_BYTES)
    nonfinite: str = _help(
        "A loss or gradient that is NaN or infinite: `stop` before the weights move, or `skip(n)`: leave "
        "out such steps, up to n of them.",
        "stop",
    )
    shuffle: bool = _help("Draw the examples of an epoch in random order.", True)
    remove_unused_columns: bool = _help("Kept off: the collator reads the columns itself.", False)
    logging_nan_inf_filter: bool = _help("Off: a loss that is not finite stops the run.", False)
    logging_steps: float = _help("Log every so many optimizer steps.", 10)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        load_in_float32(self)
        problems = list(self._problems())
        if problems:
            name = type(self).__name__
            raise RecipeError(
                "; ".join(problems),
                where=name,
                why="another computation than this would be trained, or none: nothing here is corrected",
                fix=f"help(rpo_trainer.{name}) says what each field takes",
            )
        if self.micro_batch_tokens is not None:
            if self.global_batch_size is None:
                self.global_batch_size = self.examples_per_step()
            # The loop of transformers counts batches: it is handed one for each optimizer step.
            self.gradient_accumulation_steps = 1
        elif self.global_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation(self.global_batch_size)

    def examples_per_step(self) -> int:
        """Examples of one optimizer step, over all ranks."""
        if self.micro_batch_tokens is not None and self.global_batch_size is not None:
            return self.global_batch_size
        micro = self.per_device_train_batch_size * self.world_size
        return int(micro * self.gradient_accumulation_steps)

    def mixed_precision_dtype(self) -> torch.dtype | None:
        """The autocast dtype of bf16 / fp16 runs; None: the weights' own."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    def _problems(self) -> list[str]:
        """Sentences on what does not fit."""
        problems = []
        if self.truncation not in ("drop", "cut"):
            problems.append(f"truncation must be drop or cut, got {self.truncation!r}")
        if self.special_tokens not in (None, "text", "parse"):
            problems.append(f"special_tokens must be text or parse, got {self.special_tokens!r}")
        if self.layout not in ("auto", "shared", "packed", "padded"):
            problems.append(f"layout must be auto, shared, packed or padded, got {self.layout!r}")
        if self.max_length is not None and self.max_length < 2:
            problems.append(f"max_length must be 2 or more, got {self.max_length}")
        if self.micro_batch_tokens is not None:
            for name in ("micro_batch_tokens", "global_batch_size"):
                if (value := getattr(self, name)) is not None and value < 1:
                    problems.append(f"{name} must be positive, got {value}")
        if self.auto_find_batch_size:
            problems.append(
                "auto_find_batch_size would halve per_device_train_batch_size when memory runs out, and with "
                "it the global batch, in silence: set micro_batch_tokens or a smaller micro-batch size, "
                "which change no update (`rpo-trainer plan` says what fits)"
            )
        problems += self._nonfinite_problems()
        if self.tile_bytes < 1:
            problems.append(f"tile_bytes must be positive, got {self.tile_bytes}")
        if self.torch_compile_mode in _CUDA_GRAPHS:
            problems.append(
                f"torch_compile_mode {self.torch_compile_mode} records a CUDA graph for every length of a "
                "row, and rows have all lengths: leave it out, or take max-autotune-no-cudagraphs"
            )
        if self.remove_unused_columns:
            problems.append("remove_unused_columns must stay off: the collator reads the columns")
        return problems

    def _nonfinite_problems(self) -> list[str]:
        try:
            skips = skips_allowed(self.nonfinite)
        except ValueError as error:
            return [str(error)]
        if skips and asks_for_deepspeed({"deepspeed": self.deepspeed}):
            return [
                "nonfinite: skip(n) does not work under DeepSpeed, which moves the weights within the "
                "backward pass: write stop, or take DDP or FSDP2"
            ]
        if skips and self.fp16 and not self.max_grad_norm:
            return [
                "nonfinite: skip(n) with float16 needs max_grad_norm above 0: the loss scaler looks at "
                "the gradient when it is clipped"
            ]
        return []

    def _accumulation(self, batch: int) -> int:
        where = f"{type(self).__name__}.global_batch_size"
        return accumulation_of(batch, self.per_device_train_batch_size, self.world_size, where)


def accumulation_of(batch: int, per_device: int, ranks: int, where: str) -> int:
    """Forwards of each rank in one optimizer step.

    Raises:
        RecipeError: the global batch does not divide by them.
    """
    micro = ranks * per_device
    if batch < 1 or batch % micro:
        nearest = sorted({max(micro, batch // micro * micro), (batch // micro + 1) * micro})
        smaller = [m for m in range(per_device, 0, -1) if batch > 0 and not batch % (ranks * m)]
        size = f"a micro-batch size of {smaller[0]}" if smaller else "another number of ranks"
        raise RecipeError(
            f"global_batch_size {batch} does not divide by {ranks} rank(s) × "
            f"per_device_train_batch_size {per_device}",
            where=where,
            why="every micro-batch of every rank holds the same number of examples",
            fix=f"take {' or '.join(map(str, nearest))}, or {size}",
        )
    return batch // micro


@_config
@dataclass
class SFTConfig(StepConfig):
    """Supervised fine-tuning: the mean over trained tokens of the global batch of −log π."""


@_config
@dataclass
class PreferenceConfig(StepConfig):
    """Fields that DPO and RPO share."""

    _losses: ClassVar[frozenset[str]] = frozenset()

    learning_rate: float = _help("Peak learning rate.", 1e-6)
    beta: float = _help("β: strength of the implicit reward.", 0.1)
    loss_type: str = _help("Which preference loss.", "dpo")
    sft_loss_weight: float = _help("Weight of the SFT term on the chosen (best) responses.", 0.0)
    sft_reduction: str = _help(
        "SFT term: `sum` over a response's tokens, then mean over examples; `token_mean` over all "
        "chosen tokens of the global batch; `sequence_mean` over a response's tokens, then examples.",
        "sum",
    )
    average_logps: bool = _help("Divide each response's log-prob by its number of tokens.", False)
    disable_dropout: bool = _help("Set all dropout to 0: the reference has none.", True)
    step0_check: bool = _help(
        "Stop before the first update if policy and reference disagree where they must not.", True
    )
    reference_cache_dir: str | None = _help(
        "Where reference log-probs are kept; None: `reference-cache` in output_dir.", None
    )
    reference_batch_tokens: int = _help("Tokens of one forward of the reference pass.", 8192)
    rpo_alpha: float | None = _help("Refused: elsewhere it is what sft_loss_weight is here.", None)

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.rpo_alpha is not None:
            problems.append(
                "rpo_alpha is not taken: elsewhere it means DPO plus NLL and has no reward gap. Use "
                "sft_loss_weight for the SFT term, and RPOTrainer for Reward-aware Preference "
                "Optimization"
            )
        known = sorted(self._losses)
        if self.loss_type not in known:  # a list of losses, as elsewhere, would have no hash
            hint = "; TRL's sigmoid is dpo, its sft is sft_loss_weight" if "dpo" in known else ""
            problems.append(f"loss_type {self.loss_type!r} is not one of {', '.join(known)}{hint}")
        if not (math.isfinite(self.beta) and self.beta > 0):
            problems.append(f"beta must be a positive number, got {self.beta}")
        if not (math.isfinite(self.sft_loss_weight) and self.sft_loss_weight >= 0):
            problems.append(f"sft_loss_weight must be 0 or more, got {self.sft_loss_weight}")
        if self.sft_reduction not in ("sum", "token_mean", "sequence_mean"):
            problems.append(
                f"sft_reduction must be sum, token_mean or sequence_mean, got {self.sft_reduction!r}"
            )
        if self.reference_batch_tokens < 1:
            problems.append(
                f"reference_batch_tokens must be positive, got {self.reference_batch_tokens}"
            )
        return problems


@_config
@dataclass
class DPOConfig(PreferenceConfig):
    """Direct Preference Optimization (arXiv 2305.18290), with an SFT term on the chosen responses."""

    _losses: ClassVar[frozenset[str]] = frozenset({"dpo", "ipo"})

    loss_type: str = _help("`dpo`, or `ipo`, which stops at a margin.", "dpo")
    label_smoothing: float = _help("Share of labels taken to be wrong: cDPO (loss_type dpo).", 0.0)

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if not 0.0 <= self.label_smoothing < 0.5:
            problems.append(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss_type != "dpo":
            problems.append(f"label_smoothing belongs to dpo, not to {self.loss_type}")
        return problems


@_config
@dataclass
class RPOConfig(PreferenceConfig):
    """Reward-aware Preference Optimization (Nemotron-4 340B report, section 3.3.2)."""

    _losses: ClassVar[frozenset[str]] = REWARD_LOSSES

    loss_type: str = _help(
        "rpo_bwd_kl (the report's), rpo_fwd_kl, rpo_sq or rpo_sqloo.", "rpo_bwd_kl"
    )
    reward_scale: float = _help("η: scale of the given rewards.", 1.0)

    def _problems(self) -> list[str]:
        problems = super()._problems()
        scale: Any = self.reward_scale
        if scale == "auto":
            problems.append(
                "reward_scale must be a positive number, got 'auto', which recipes take: `rpo-trainer "
                "calibrate` shows what fits"
            )
        elif not (math.isfinite(scale) and scale > 0):
            problems.append(f"reward_scale must be a positive number, got {scale}")
        return problems


@_config
@dataclass
class RewardConfig(StepConfig):
    """Reward models: regression on attributes (arXiv 2406.08673), or Bradley-Terry on pairs."""

    learning_rate: float = _help("Peak learning rate.", 1e-5)
    objective: str = _help(
        "`bradley_terry` (pairs) or `regression` (ratings of attributes).", "bradley_terry"
    )
    attributes: tuple[str, ...] | None = _help(
        "Regression: what is rated, in the order of the model's heads.", None
    )
    reward_weights: str | Mapping[str, float] | None = _help(
        "Weight of each attribute in the reward, by name; or a published set: "
        "nemotron-4-340b-reward, llama3-70b-steerlm-rm. None: what the model has, else the mean.",
        None,
    )
    rating_range: tuple[float, float] | None = _help(
        "Regression: lowest and highest rating that can be right; None: any number.", None
    )
    margin_scale: float = _help(
        "Bradley-Terry: −log σ(r_c − r_r − margin) with margin = this times the gap of the given "
        "rewards. 0: no margin, and no rewards are needed.",
        0.0,
    )

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.objective not in ("bradley_terry", "regression"):
            problems.append(
                f"objective must be bradley_terry or regression, got {self.objective!r}"
            )
        names = list(self.attributes or ())
        if self.objective == "regression":
            if not names or len(set(names)) < len(names):
                problems.append("regression needs attributes, each named once")
            if self.margin_scale:
                problems.append("margin_scale belongs to bradley_terry, not to regression")
        else:
            given = ("attributes", self.attributes), ("rating_range", self.rating_range)
            problems += [
                f"{name} belongs to regression, not to {self.objective}"
                for name, value in given
                if value is not None
            ]
        if self.rating_range is not None and not self.rating_range[0] < self.rating_range[1]:
            problems.append(f"rating_range must rise, got {list(self.rating_range)}")
        if not (math.isfinite(self.margin_scale) and self.margin_scale >= 0):
            problems.append(f"margin_scale must be 0 or more, got {self.margin_scale}")
        return problems
