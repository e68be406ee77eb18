"""The fields that all our trainers share, beside those of `transformers.TrainingArguments`."""

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
from rpo_trainer.trainers.engine import load_in_float32
from rpo_trainer.trainers.trl_arguments import TrlArguments
from rpo_trainer.trainers.unknown_arguments import known_arguments

C = TypeVar("C", bound=TrainingArguments)

DEFAULT_SKIPPED_STEPS = 3

# The two names of gradient checkpointing; some versions of transformers have the first alone.
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
# Fields that a config fills in where they are left alone.
_DERIVED = (
    *_CHECKPOINTING, "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "bf16",
    "shuffle", "train_sampling_strategy", "global_batch_size", "gradient_accumulation_steps",
    "metric_for_best_model", "greater_is_better", "eval_steps",
)  # fmt: skip


class TrlDefault(NamedTuple):
    """A default that differs from TRL's: what TRL's does ("": the same effect), and why ours differs."""

    trl: str
    reason: str


def described(text: str, default: Any, **parsed: Any) -> Any:
    """A field with its help.

    Args:
        parsed: further arguments of `argparse`'s `add_argument`: HfArgumentParser hands them on.
    """
    return field(default=default, metadata={"help": text, **parsed})


def switch(text: str) -> Any:
    """A field that is True, False or None; on a command line its name alone means True."""
    return described(text, None, nargs="?", const=True)


def config(made_of: type[C]) -> type[C]:
    """The class, which has the help of its fields in its docstring, and answers unknown arguments."""
    made_of.__doc__ = _with_fields(made_of)
    made = made_of.__init__
    known = inspect.signature(made).parameters

    @functools.wraps(made)
    def init(self: C, *args: Any, **given: Any) -> None:
        made(self, *args, **known_arguments(made_of.__name__, list(known), given))

    made_of.__init__ = init  # type: ignore[assignment, method-assign]
    return made_of


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


@config
@dataclass
class BaseConfig(TrlArguments):
    """Fields that all our trainers share."""

    # Fields whose default differs from TRL's, other differences, and whether the log says so.
    trl_defaults: ClassVar[Mapping[str, TrlDefault]] = {
        "truncation": TrlDefault(
            "cuts them", "Responses that are cut teach the model to stop before the end."
        ),
        "gradient_checkpointing": TrlDefault(
            "", "On by default as in TRL, but a default must not fail with models that cannot."
        ),
        "remove_unused_columns": TrlDefault(
            "", "Columns are read by the collator; there is nothing to remove."
        ),
        "logging_nan_inf_filter": TrlDefault(
            "hides losses that are not finite from the log",
            "Losses that are not finite stay visible in the log.",
        ),
    }
    unlike_trl: ClassVar[tuple[str, ...]] = ()
    compared_with_trl: ClassVar[bool] = True
    _VALID_DICT_FIELDS = [*TrlArguments._VALID_DICT_FIELDS, "derived", "chat_template_kwargs"]  # noqa: RUF012

    max_length: int | None = described(
        "Longest prompt + response, in tokens; None: no limit.", 1024
    )
    truncation: str = described(
        "What becomes of longer rows: `drop` or `cut` (responses lose their end).",
        "drop",
    )
    special_tokens: str | None = described(
        "What the text of special tokens in the rows stands for: `text` (letters) or `parse` (the "
        "tokens, for rows that went through a chat template before). None: `text`, with a warning.",
        None,
    )
    chat_template_kwargs: dict[str, Any] | str | None = described(  # noqa: RUF009
        "Variables of the chat template, such as {'enable_thinking': False}, for rows of messages (a dict, "
        "or JSON); a row's own column of this name goes before them, key by key.",
        None,
    )
    global_batch_size: int | None = described(
        "Examples of one optimizer step over all ranks; accumulation follows from it. None: "
        "per_device_train_batch_size × gradient_accumulation_steps × ranks.",
        None,
    )
    micro_batch_tokens: int | None = described(
        "Tokens of one training forward, in place of per_device_train_batch_size: each global batch "
        "is split into as many forwards as its lengths need. A longer example is a forward by itself.",
        None,
    )
    layout: str = described(
        "How responses lie in a row: `shared` (each prompt once), `packed`, `padded` (one response a row), "
        "`single` (one response a forward), or `auto`: the first of them that is proved to give what the "
        "model's plain forward gives.",
        "auto",
    )
    logits_chunk_bytes: int = described(
        "Most memory for one tile of logits, in bytes.", DEFAULT_LOGITS_CHUNK_BYTES
    )
    router_aux_loss_coef: float | None = described(
        "Weight of the load-balancing loss of a mixture of experts' routers; 0: none. None: the weight in "
        "the model's config, where that asks for the loss (output_router_logits true).",
        None,
    )
    on_nonfinite: str = described(
        "A loss or gradient that is NaN or infinite: `stop` before the weights move, or `skip`: leave such "
        "steps out, up to `max_skipped_steps`.",
        "stop",
    )
    max_skipped_steps: int | None = described(
        "With on_nonfinite=skip: how many steps of a run may be left out before it stops. None: "
        f"{DEFAULT_SKIPPED_STEPS}.",
        None,
    )
    shuffle: bool | None = switch(
        "Whether each epoch is a new permutation of the examples; False: the order of the data. None: as "
        "train_sampling_strategy says (random: True, sequential: False)."
    )
    bf16: bool | None = switch(  # type: ignore[assignment]
        "bfloat16 arithmetic (autocast). None: on where fp16 is off and the device computes in bfloat16, "
        "off on a CPU, where it saves nothing."
    )
    gradient_checkpointing: bool | None = switch(
        "Recompute activations in the backward pass. None: on where the model can and FSDP does not do it "
        "already."
    )
    remove_unused_columns: bool = described(
        "Kept off: the collator reads the columns itself.", False
    )
    logging_nan_inf_filter: bool = described("Off: a loss that is not finite stops the run.", False)
    logging_steps: float = described("Log every so many optimizer steps.", 10)
    derived: dict[str, Any] | str | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={
            "help": "Written by the config: the fields that it has filled in, each as it was given and "
            "as it became, so that a copy (dataclasses.replace, to_dict) fills them in again."
        },
    )

    def __post_init__(self) -> None:
        require_readable_settings(self)
        self._forget_derived()
        if self.truncation_mode == "keep_start":
            self.truncation = "cut"
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
        """In a copy, fields that were filled in are as they were given, unless the copy has another value."""
        for name, (given, filled_in) in self._derived().items():
            if name in _DERIVED and getattr(self, name, None) == filled_in:
                setattr(self, name, given)

    def _derived(self) -> dict[str, Any]:
        known = json.loads(self.derived) if isinstance(self.derived, str) else self.derived
        return known or {}

    def _set_batch(self, asked_accumulation: int) -> None:
        """Global batch and accumulation, each from the other; a token budget has batches of its own."""
        if self.micro_batch_tokens is not None:
            if self.global_batch_size is None:
                self.global_batch_size = self.examples_per_step()
            elif asked_accumulation != 1:
                raise RecipeError(
                    f"gradient_accumulation_steps={asked_accumulation} beside micro_batch_tokens and "
                    "global_batch_size",
                    code="training.conflicting-settings",
                    where=type(self).__name__,
                    why="the number of forwards of a step follows from the lengths of its examples",
                    fix="remove gradient_accumulation_steps",
                )
            # The loop of transformers counts batches; each one that it gets is an optimizer step.
            self.gradient_accumulation_steps = 1
        elif self.global_batch_size is not None:
            self.gradient_accumulation_steps = accumulation_of(
                self.global_batch_size,
                self.per_device_train_batch_size,
                self.world_size,
                where=f"{type(self).__name__}.global_batch_size",
            )
            if asked_accumulation not in (1, self.gradient_accumulation_steps):
                raise RecipeError(
                    f"gradient_accumulation_steps={asked_accumulation}, and global_batch_size="
                    f"{self.global_batch_size} takes {self.gradient_accumulation_steps}",
                    code="training.conflicting-settings",
                    where=type(self).__name__,
                    why="both say how many examples an optimizer step has",
                    fix="remove one of the two",
                )

    def check(self) -> None:
        """Raises RecipeError naming all values that do not fit; trainers call it for changed configs."""
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
                why="every setting that a config accepts takes effect",
                fix=f"change them; see help(rpo_trainer.{name}), and docs/training-arguments.md for the "
                "fields of transformers",
            )

    def _set_defaults(self) -> None:
        """What depends on the machine, or on another field."""
        if self.bf16 is None:
            self.bf16 = bfloat16_by_default(self)
        require_one_checkpointing(self)
        # transformers has renamed them, and warns of the old names where the new ones are known.
        for end in ("", "_kwargs"):
            old, new = (name + end for name in _CHECKPOINTING)
            if getattr(self, new, True) is None:
                setattr(self, new, getattr(self, old))
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric is not None:
            self.greater_is_better = not lowest_is_best(metric)

    @property
    def checkpointing_is_default(self) -> bool:
        """Whether nobody has said if activations are to be recomputed."""
        return self._leaves_checkpointing(
            {
                name: given
                for name, (given, filled_in) in self._derived().items()
                if name in _CHECKPOINTING and getattr(self, name) == filled_in
            }
        )

    def set_default_checkpointing(self, able: bool) -> None:
        """The default for a model that can recompute its activations, or cannot."""
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
        """`shuffle` and `train_sampling_strategy` say the same; left alone, each follows the other."""
        if self.shuffle is None:
            self.shuffle = self.train_sampling_strategy != "sequential"
        elif not self.shuffle and self.train_sampling_strategy == "random":
            self.train_sampling_strategy = "sequential"

    def examples_per_step(self) -> int:
        """Examples of one optimizer step, over all ranks."""
        if self.micro_batch_tokens is not None and self.global_batch_size is not None:
            return self.global_batch_size
        micro = self.per_device_train_batch_size * self.world_size
        return int(micro * self.gradient_accumulation_steps)

    def mixed_precision_dtype(self) -> torch.dtype | None:
        """The autocast dtype of bf16 / fp16 runs; None: the weights' own."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    def _problems(self) -> list[Problem]:
        """What does not fit; a subclass adds the problems of its own fields."""
        return [*config_problems(self), *self.trl_problems()]

    @property
    def allowed_skips(self) -> int:
        """How many steps that are not finite may be left out; 0: the first one stops the run."""
        if self.on_nonfinite != "skip":
            return 0
        given = self.max_skipped_steps
        return DEFAULT_SKIPPED_STEPS if given is None else given
