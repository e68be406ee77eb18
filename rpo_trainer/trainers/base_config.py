"""Fields that all trainers share, in addition to those of `transformers.TrainingArguments`."""

from __future__ import annotations

import functools
import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from transformers import TrainingArguments

from rpo_trainer.errors import RecipeError
from rpo_trainer.step.logprobs import DEFAULT_LOGITS_CHUNK_BYTES
from rpo_trainer.trainers.argument_checks import (
    bfloat16_by_default,
    checkpointing_by_default,
    lowest_is_best,
    require_one_checkpointing,
    require_readable_settings,
)
from rpo_trainer.trainers.argument_status import Problem
from rpo_trainer.trainers.config_checks import accumulation_of, config_problems
from rpo_trainer.trainers.engine import load_in_float32, waits_each_micro_batch
from rpo_trainer.trainers.trl_arguments import TrlArguments
from rpo_trainer.trainers.unknown_arguments import known_arguments

C = TypeVar("C", bound=TrainingArguments)

DEFAULT_SKIPPED_STEPS = 3

# Two names of gradient checkpointing; some versions of transformers only have the first.
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
# Fields that a config fills in unless they are given.
_DERIVED = (
    *_CHECKPOINTING, "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "bf16",
    "shuffle", "train_sampling_strategy", "global_batch_size", "gradient_accumulation_steps",
    "metric_for_best_model", "greater_is_better", "eval_steps",
)  # fmt: skip


class TrlDefault(NamedTuple):
    """A default that differs from TRL's: what TRL does ("": the same effect), and why ours differs."""

    trl: str
    reason: str


def described(text: str, default: Any, **parsed: Any) -> Any:
    """Return a field with its help.

    Args:
        parsed: further arguments of `argparse`'s `add_argument`; HfArgumentParser passes them on.
    """
    return field(default=default, metadata={"help": text, **parsed})


def switch(text: str) -> Any:
    """Return a field that is True, False or None; on a command line its name alone means True."""
    return described(text, None, nargs="?", const=True)


def config(made_of: type[C]) -> type[C]:
    """Add the help of the fields to the docstring of a config, and answers to unknown arguments."""
    made_of.__doc__ = _with_fields(made_of)
    made = made_of.__init__
    known = inspect.signature(made).parameters

    @functools.wraps(made)
    def init(self: C, *args: Any, **given: Any) -> None:
        made(self, *args, **known_arguments(made_of.__name__, list(known), given))

    made_of.__init__ = init  # type: ignore[assignment, method-assign]
    return made_of


def _with_fields(config: type[C]) -> str:
    """Return the docstring of a config with the help of its own fields."""
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
    head = "Args, in addition to those of transformers.TrainingArguments, with type and default:"
    return "\n".join([f"{config.__doc__}\n", head, *lines])


@config
@dataclass
class BaseConfig(TrlArguments):
    """Fields that all trainers share."""

    # Fields whose default differs from TRL's, other differences, and whether to log them.
    trl_defaults: ClassVar[Mapping[str, TrlDefault]] = {
        "truncation": TrlDefault("truncates", "Truncated responses teach the model to stop early."),
        "gradient_checkpointing": TrlDefault(
            "", "On by default as in TRL, but only for models that support it."
        ),
        "remove_unused_columns": TrlDefault(
            "", "The collator selects the columns; there is nothing to remove."
        ),
        "logging_nan_inf_filter": TrlDefault(
            "hides non-finite losses from the log",
            "Non-finite losses stay visible in the log.",
        ),
    }
    unlike_trl: ClassVar[tuple[str, ...]] = ()
    compared_with_trl: ClassVar[bool] = True
    _VALID_DICT_FIELDS = [*TrlArguments._VALID_DICT_FIELDS, "derived", "chat_template_kwargs"]  # noqa: RUF012

    max_length: int | None = described(
        "Maximum number of tokens of prompt + response; None: no limit.", 1024
    )
    truncation: str = described(
        "Longer rows: `drop` them, or `truncate` their responses.",
        "drop",
    )
    special_tokens: str | None = described(
        "How the text of special tokens in the rows is tokenized: `text` (as characters) or `parse` (as the "
        "tokens, for rows to which a chat template has been applied). None: `parse` for SFT rows of plain "
        "text, otherwise `text` with a warning.",
        None,
    )
    chat_template_kwargs: dict[str, Any] | str | None = described(  # noqa: RUF009
        "Variables of the chat template, such as {'enable_thinking': False}, for rows of messages (a dict "
        "or JSON); a column of this name in the rows takes precedence, key by key.",
        None,
    )
    global_batch_size: int | None = described(
        "Examples per optimizer step, over all ranks; gradient_accumulation_steps follows from it. None: "
        "per_device_train_batch_size × gradient_accumulation_steps × ranks.",
        None,
    )
    micro_batch_tokens: int | None = described(
        "Maximum number of tokens per training forward, instead of per_device_train_batch_size: each global "
        "batch is split into as many forwards as needed. A longer example gets its own forward. 0: none. "
        "None: with FSDP, ZeRO-2 and ZeRO-3 on several ranks, the tokens of the largest micro-batch of "
        "per_device_train_batch_size examples; otherwise none.",
        None,
    )
    layout: str = described(
        "How responses are laid out: `shared` (each prompt once per packed row), `packed`, `padded` (one "
        "response per row), `single` (one response per forward), or `auto`: the first of them that "
        "reproduces the log-probs of the model's own forward.",
        "auto",
    )
    logits_chunk_bytes: int = described(
        "Maximum size of a tile of logits, in bytes.", DEFAULT_LOGITS_CHUNK_BYTES
    )
    router_aux_loss_coef: float | None = described(
        "Weight of the load-balancing loss of mixtures of experts; 0: none. None: the weight in the model's "
        "config if that enables the loss (output_router_logits true).",
        None,
    )
    on_nonfinite: str = described(
        "If a loss or gradient is NaN or infinite: `stop` before the weights are updated, or `skip` the "
        "step, at most `max_skipped_steps` times.",
        "stop",
    )
    max_skipped_steps: int | None = described(
        "With on_nonfinite=skip: maximum number of skipped steps of a run. None: "
        f"{DEFAULT_SKIPPED_STEPS}.",
        None,
    )
    shuffle: bool | None = switch(
        "Whether each epoch is a new permutation of the examples; False: the order of the data. None: "
        "follows train_sampling_strategy (random: True, sequential: False)."
    )
    bf16: bool | None = switch(  # type: ignore[assignment]
        "bfloat16 autocast. None: on if fp16 is off and the GPU supports bfloat16; off on a CPU, where it "
        "saves nothing."
    )
    gradient_checkpointing: bool | None = switch(
        "Recompute activations in the backward pass. None: on if the model supports it and FSDP does not do "
        "it."
    )
    async_save: bool = described(
        "Write checkpoints while training continues: weights and optimizer state are copied to CPU memory by "
        "the process that saves, and a thread writes the copy. Not with FSDP and DeepSpeed.",
        False,
    )
    remove_unused_columns: bool = described("Only False: the collator selects the columns.", False)
    logging_nan_inf_filter: bool = described("Only False: see on_nonfinite.", False)
    logging_steps: float = described("Number of optimizer steps between log lines.", 10)
    derived: dict[str, Any] | str | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={
            "help": "Internal: fields that the config has filled in, with the given and the derived value, "
            "so that a copy (dataclasses.replace, to_dict) derives them again."
        },
    )

    def __post_init__(self) -> None:
        require_readable_settings(self)
        self._forget_derived()
        if self.truncation_mode == "keep_start":
            self.truncation = "truncate"
        names = [name for name in _DERIVED if hasattr(self, name)]
        given = {name: getattr(self, name) for name in names}
        self._set_defaults()
        super().__post_init__()  # type: ignore[no-untyped-call]
        load_in_float32(self)
        if self._leaves_checkpointing(given):
            self._set_checkpointing(checkpointing_by_default(self))
        self._set_order()
        self.check()
        self._set_batch(given["gradient_accumulation_steps"])
        self.derived = {
            name: [given[name], now]
            for name in names
            if (now := getattr(self, name)) != given[name]
        }
        self.note_trl_arguments()
        self.use_liger_kernel = (
            False  # the head is fused in any case; the layers keep their own kernels
        )

    def _forget_derived(self) -> None:
        """Reset derived fields of a copy to the given values, unless the copy has another value."""
        for name, (given, filled_in) in self._derived().items():
            if name in _DERIVED and getattr(self, name, None) == filled_in:
                setattr(self, name, given)

    def _derived(self) -> dict[str, Any]:
        known = json.loads(self.derived) if isinstance(self.derived, str) else self.derived
        return known or {}

    def _set_batch(self, accumulation_steps: int) -> None:
        """Derive global batch size and accumulation steps from each other."""
        if self.micro_batch_tokens:
            if self.global_batch_size is None:
                self.global_batch_size = self.examples_per_step()
            elif accumulation_steps != 1:
                raise RecipeError(
                    f"gradient_accumulation_steps={accumulation_steps} conflicts with micro_batch_tokens and "
                    "global_batch_size",
                    code="training.conflicting-settings",
                    where=type(self).__name__,
                    why="the number of forwards per step follows from the lengths of its examples",
                    fix="remove gradient_accumulation_steps",
                )
            # The loop of transformers gets one batch per optimizer step.
            self.gradient_accumulation_steps = 1
        elif self.global_batch_size is not None:
            self.gradient_accumulation_steps = accumulation_of(
                self.global_batch_size,
                self.per_device_train_batch_size,
                self.world_size,
                where=f"{type(self).__name__}.global_batch_size",
            )
            if accumulation_steps not in (1, self.gradient_accumulation_steps):
                raise RecipeError(
                    f"gradient_accumulation_steps={accumulation_steps} conflicts with global_batch_size="
                    f"{self.global_batch_size}, which requires {self.gradient_accumulation_steps}",
                    code="training.conflicting-settings",
                    where=type(self).__name__,
                    fix="remove one of the two",
                )
        if self.by_tokens and not self.micro_batch_tokens:
            self.global_batch_size = self.examples_per_step()
            self.gradient_accumulation_steps = 1

    def check(self) -> None:
        """Raise RecipeError that lists all invalid values; trainers call it again for changed configs."""
        problems = list(self._problems())
        if problems:
            name = type(self).__name__
            raise RecipeError(
                "; ".join(problem.text for problem in problems),
                code=problems[0].code,
                details={
                    "codes": [problem.code for problem in problems],
                    "settings": [problem.setting for problem in problems],
                },
                where=name,
                fix=f"change them; see help(rpo_trainer.{name}) and docs/training-arguments.md",
            )

    def _set_defaults(self) -> None:
        """Set defaults that depend on the machine or on another field."""
        if self.bf16 is None:
            self.bf16 = bfloat16_by_default(self)
        require_one_checkpointing(self)
        # transformers has renamed them, and warns about the old names in versions with the new ones.
        for end in ("", "_kwargs"):
            old, new = (name + end for name in _CHECKPOINTING)
            if getattr(self, new, True) is None:
                setattr(self, new, getattr(self, old))
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric is not None:
            self.greater_is_better = not lowest_is_best(metric)

    @property
    def checkpointing_is_default(self) -> bool:
        """Whether gradient checkpointing has not been set explicitly."""
        return self._leaves_checkpointing(
            {
                name: given
                for name, (given, filled_in) in self._derived().items()
                if name in _CHECKPOINTING and getattr(self, name) == filled_in
            }
        )

    def set_default_checkpointing(self, able: bool) -> None:
        """Set the default of gradient checkpointing for a model that supports it, or does not."""
        self._set_checkpointing(able and checkpointing_by_default(self))
        now = {
            name: [None, self.gradient_checkpointing]
            for name in _CHECKPOINTING
            if hasattr(self, name)
        }
        self.derived = {**self._derived(), **now}

    def _leaves_checkpointing(self, given: Mapping[str, Any]) -> bool:
        return all(given.get(name, 0) is None for name in _CHECKPOINTING if hasattr(self, name))

    def _set_checkpointing(self, on: bool) -> None:
        for name in _CHECKPOINTING:
            if hasattr(self, name):
                setattr(self, name, on)

    def _set_order(self) -> None:
        """Derive `shuffle` and `train_sampling_strategy` from each other: they have the same meaning."""
        if self.shuffle is None:
            self.shuffle = self.train_sampling_strategy != "sequential"
        elif not self.shuffle and self.train_sampling_strategy == "random":
            self.train_sampling_strategy = "sequential"

    @property
    def by_tokens(self) -> bool:
        """Whether micro-batches are formed by a budget of tokens: `micro_batch_tokens`, or the default."""
        if self.micro_batch_tokens is None:
            return self.world_size > 1 and waits_each_micro_batch(self)
        return self.micro_batch_tokens > 0

    @property
    def accumulation_by_number(self) -> int:
        """Forwards per rank and optimizer step if per_device_train_batch_size applies."""
        if self.micro_batch_tokens or not self.by_tokens:
            return int(self.gradient_accumulation_steps)
        return int(self.examples_per_step() // (self.per_device_train_batch_size * self.world_size))

    def examples_per_step(self) -> int:
        """Return the number of examples per optimizer step, over all ranks."""
        if self.by_tokens and self.global_batch_size is not None:
            return self.global_batch_size
        micro = self.per_device_train_batch_size * self.world_size
        return int(micro * self.gradient_accumulation_steps)

    def mixed_precision_dtype(self) -> torch.dtype | None:
        """Return the autocast dtype; None: no autocast."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    def _problems(self) -> list[Problem]:
        """Return the problems of the values; a subclass adds those of its own fields."""
        return [*config_problems(self), *self.trl_problems()]

    @property
    def allowed_skips(self) -> int:
        """Maximum number of skipped non-finite steps; 0: the first one stops the run."""
        if self.on_nonfinite != "skip":
            return 0
        given = self.max_skipped_steps
        return DEFAULT_SKIPPED_STEPS if given is None else given
