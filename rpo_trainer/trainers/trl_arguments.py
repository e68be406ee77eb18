"""Arguments of TRL's configs: fields that our configs accept so that scripts written for TRL run.

`trl_table.py` states what each does. All are None unless given. They are fields and not only arguments of the
constructor, so that they also work on a command line and as attributes of an existing config.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from rpo_trainer.trainers.argument_status import Problem, Setting, by_name, refusals
from rpo_trainer.trainers.trl_table import ALL

logger = logging.getLogger(__name__)

_PACKING_NOTE = (
    "per_device_train_batch_size counts examples, not packed rows; micro_batch_tokens sets the tokens of a "
    "forward"
)


def trl(help_text: str, **parsed: Any) -> Any:
    """Return a field of TRL.

    Args:
        parsed: further arguments of `argparse`'s `add_argument`.
    """
    return field(default=None, metadata={"help": help_text, **parsed})


def trl_switch(help_text: str) -> Any:
    """Return a field of TRL that is True, False or None; on a command line its name alone means True."""
    return trl(help_text, nargs="?", const=True)


@dataclass
class TrlArguments(TrainingArguments):
    """Arguments that TRL's SFT, DPO and reward configs share."""

    trl_table: ClassVar[tuple[Setting, ...]] = ALL
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    model_init_kwargs: dict[str, Any] | str | None = trl(  # noqa: RUF009
        "Arguments of from_pretrained for a model that is given by name; a dict or JSON."
    )
    trust_remote_code: bool | None = trl_switch(
        "Whether a model or tokenizer that is given by name may run code from its repository."
    )
    pad_token: str | None = trl("Padding token, set on the tokenizer.")
    truncation_mode: str | None = trl("`keep_start` is truncation=truncate.")
    dataset_num_proc: int | None = trl("No effect: the number of processes is chosen by size.")
    pad_to_multiple_of: str | None = trl("No effect: rows are packed.")
    padding_free: bool | None = trl_switch("No effect: rows are packed wherever possible.")
    activation_offloading: bool | None = trl_switch("Only False is accepted.")

    def trl_problems(self) -> Iterator[Problem]:
        """Yield a problem for each value of these arguments that would change the result."""
        yield from refusals(self.trl_table, vars(self), {})

    def note_trl_arguments(self) -> None:
        """Log a WARNING, once per process, with the arguments that request the existing behavior."""
        rows = by_name(self.trl_table)
        known = {own.name for own in fields(self)}
        given = [
            f"{name}={value!r}"
            for name, row in rows.items()
            if name in known
            and row.status != "read"
            and name != "truncation_mode"
            and (value := getattr(self, name)) is not None
        ]
        if self.use_liger_kernel:
            given.append("use_liger_kernel=True")
        if not given or self.process_index != 0:
            return
        packing = f". {_PACKING_NOTE}" if getattr(self, "packing", None) else ""
        _note_once(
            f"{type(self).__name__}: arguments without effect, because they request the existing "
            f"behavior: {', '.join(given)}{packing}"
        )


@functools.cache
def _note_once(line: str) -> None:
    logger.warning("%s", line)


@dataclass
class TrlTokens:
    """Arguments of the tokenizer that SFT and reward configs share."""

    eos_token: str | None = trl("End token, set on the tokenizer.")
    chat_template_path: str | None = trl("Path of a Jinja file: the chat template.")


@dataclass
class TrlSFT(TrlTokens):
    """Arguments of TRL's SFTConfig."""

    dataset_text_field: str | None = trl("Column of plain text to train on; `text` if None.")
    dataset_kwargs: dict[str, Any] | str | None = trl(  # noqa: RUF009
        "Only skip_prepare_dataset is accepted; it has no effect."
    )
    shuffle_dataset: bool | None = trl_switch("No effect: see shuffle.")
    packing: bool | None = trl_switch("No effect: rows are packed wherever possible.")
    packing_strategy: str | None = trl("Only `bfd` is accepted; it has no effect.")
    eval_packing: bool | None = trl_switch("No effect: rows are packed wherever possible.")
    completion_only_loss: bool | None = trl_switch("Only True is accepted.")
    assistant_only_loss: bool | None = trl_switch("Only True is accepted.")
    loss_type: str | None = trl("Only `nll` is accepted.")


@dataclass
class TrlPreference:
    """Arguments of TRL's DPOConfig."""

    precompute_ref_log_probs: bool | None = trl_switch("No effect: they are always precomputed.")
    reference_free: bool | None = trl_switch("Only False is accepted.")
    loss_weights: list[float] | None = trl("Only [1.0] is accepted.")  # noqa: RUF009
    f_divergence_type: str | None = trl("Only `reverse_kl` is accepted.")
    f_alpha_divergence_coef: float | None = trl("No effect with reverse_kl.")
    ld_alpha: float | None = trl("Only 1.0 is accepted.")
    use_weighting: bool | None = trl_switch("Only False is accepted.")
    discopop_tau: float | None = trl("No effect: it belongs to a loss that is not supported.")
    sync_ref_model: bool | None = trl_switch("Only False is accepted.")
    ref_model_mixup_alpha: float | None = trl("No effect without sync_ref_model.")
    ref_model_sync_steps: int | None = trl("No effect without sync_ref_model.")


@dataclass
class TrlReward(TrlTokens):
    """Arguments of TRL's RewardConfig."""

    center_rewards_coefficient: float | None = trl("Only 0 is accepted.")
