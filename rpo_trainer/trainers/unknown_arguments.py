"""What to write in place of an argument that a config does not take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rpo_trainer.errors import RecipeError, did_you_mean

_TOGETHER = "set max_length, which is for prompt and response together, and remove it"
_PACKED = "remove it: rows are packed without padding wherever the model allows it (layout)"
_ALWAYS = "remove it: reference log-probs are always computed once, before training, and kept"
_ASSISTANT = "remove it: only what the assistant says is trained, in every format of rows"
_TEMPLATE = "set it on the tokenizer that is given as processing_class, and remove it here"
_ROUNDS = "train in rounds: give the model of one as `model` and `ref_model` of the next"
_NOT_OFFERED = "remove it: it is not offered here, and nothing takes its place"
# Arguments of TRL's configs, older names too
ELSEWHERE = {
    "max_prompt_length": _TOGETHER,
    "max_completion_length": _TOGETHER,
    "max_target_length": _TOGETHER,
    "max_seq_length": "write max_length",
    "truncation_mode": "write truncation: `drop` or `cut`",
    "padding_free": _PACKED,
    "packing": _PACKED,
    "eval_packing": _PACKED,
    "packing_strategy": _PACKED,
    "pad_to_multiple_of": _PACKED,
    "precompute_ref_log_probs": _ALWAYS,
    "precompute_ref_batch_size": "write reference_batch_tokens",
    "loss_weights": "write sft_loss_weight: the weight of the SFT term beside a weight of 1",
    "assistant_only_loss": _ASSISTANT,
    "completion_only_loss": _ASSISTANT,
    "shuffle_dataset": "remove it, or write shuffle: each epoch is a new permutation unless shuffle=False",
    "dataset_num_proc": "remove it: as many processes tokenise as it pays for",
    "dataset_text_field": "give rows of `prompt` and `response`, or of `messages`",
    "model_init_kwargs": "load the model with from_pretrained(...) and give it as `model`",
    "trust_remote_code": "load the model with from_pretrained(...) and give it as `model`",
    "model_adapter_name": "give the model with its adapter active",
    "reference_free": "there is no loss without a reference here: remove it",
    "chat_template_path": _TEMPLATE,
    "eos_token": _TEMPLATE,
    "pad_token": _TEMPLATE,
    "sync_ref_model": _ROUNDS,
    "ref_model_mixup_alpha": _ROUNDS,
    "ref_model_sync_steps": _ROUNDS,
    "ld_alpha": _NOT_OFFERED,
    "f_divergence_type": _NOT_OFFERED,
    "f_alpha_divergence_coef": _NOT_OFFERED,
    "use_weighting": _NOT_OFFERED,
    "discopop_tau": _NOT_OFFERED,
    "dataset_kwargs": _NOT_OFFERED,
    "activation_offloading": _NOT_OFFERED,
    "center_rewards_coefficient": _NOT_OFFERED,
    "gt_reward_scale": "write reward_scale (of RPOConfig)",
    "ref_policy_kl_penalty": "write beta",
}
# Arguments of the constructors of transformers' and TRL's trainers
_EXTEND = (
    "subclass the trainer and extend `evaluate`: an evaluation has loss, margins and accuracies"
)
CONSTRUCTOR = {
    "compute_metrics": _EXTEND,
    "preprocess_logits_for_metrics": "remove it: the logits are never held in memory",
    "compute_loss_func": "subclass the trainer and give its losses in `losses`",
    "data_collator": "remove it: rows are packed by the trainer's own collator",
    "tokenizer": "write processing_class",
    "formatting_func": "map the data set to rows of `messages`, or of `prompt` and `response`, before",
    "model_init": "give the model itself as `model`",
    "optimizer_cls_and_kwargs": "write optim and optim_args in the config, or give optimizers=(it, None)",
    "reward_processing_class": "write processing_class",
    "dataset_text_field": "give rows of `prompt` and `response`, or of `messages`",
    "max_seq_length": "set max_length in the config",
    "max_length": "set it in the config",
    "beta": "set it in the config",
    "packing": _PACKED,
    "dataset_num_proc": "remove it: as many processes tokenise as it pays for",
    "quantization_config": "load the model with it and give it as `model`",
    "rollout_func": "remove it: these trainers do not sample",
    "reward_funcs": "score rows before training (`rpo-trainer score`)",
}


def answering_unknown_arguments(make: Callable[..., None]) -> Callable[..., None]:
    """A trainer's `__init__` that says what to write in place of an argument that it does not take.

    Raises:
        RecipeError: from the new `__init__`.
    """
    parameters = inspect.signature(make).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return make  # a subclass that hands its arguments on
    known = [name for name in parameters if name != "self"]

    @functools.wraps(make)
    def init(self: Any, *args: Any, **given: Any) -> None:
        unknown = [name for name in given if name not in known]
        if unknown:
            raise RecipeError(
                f"there is no argument {' or '.join(unknown)}",
                code="training.unknown-argument",
                where=type(self).__name__,
                why="the trainer has no use for it",
                fix="; ".join(
                    f"{name}: {CONSTRUCTOR[name]}"
                    if name in CONSTRUCTOR
                    else instead_of(name, known)
                    for name in unknown
                ),
            )
        make(self, *args, **given)

    return init


def instead_of(name: str, known: Sequence[str]) -> str:
    """What to write in place of the argument `name`, which is not one of the `known` ones."""
    if name in ELSEWHERE:
        return f"{name}: {ELSEWHERE[name]}"
    near = did_you_mean(name, known)
    return (
        f"{name}: did you mean {near}?" if near else f"{name}: remove it: there is nothing like it"
    )
