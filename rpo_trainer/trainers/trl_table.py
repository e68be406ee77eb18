"""Treatment of the arguments that TRL's configs have in addition to those of transformers, by field.

Checked against TRL 1.16. None means that an argument was not given, and is always accepted.
"""

from __future__ import annotations

from rpo_trainer.trainers.argument_status import Setting, harmless, read, refused

_PACKED = "rows are packed without padding wherever the model allows it (`layout`)"
_OTHER_LOSS = "it changes the loss, and is not implemented"
_SYNC = "it belongs to `sync_ref_model`"


ALL: tuple[Setting, ...] = (
    read(
        "model_init_kwargs",
        "arguments of `from_pretrained` for a model or reference model that is given by name; the default "
        "dtype is float32",
    ),
    read(
        "trust_remote_code",
        "whether a model or tokenizer that is given by name may run code from its repository",
    ),
    read("pad_token", "set on the tokenizer; it must be one of its tokens"),
    Setting(
        ("truncation_mode",), "refused", "responses are truncated at their end",
        "remove it; max_length and truncation determine what happens to long rows",
        taken=(None, "keep_start"),
    ),
    harmless("dataset_num_proc", "the number of processes follows from the size of the data set"),
    harmless("pad_to_multiple_of padding_free", _PACKED),
    refused(
        "activation_offloading", "activations are never moved to the CPU",
        "remove it; gradient_checkpointing, micro_batch_tokens and FSDP save memory", None, False,
    ),
)  # fmt: skip

_TOKENS: tuple[Setting, ...] = (
    read("eos_token", "set on the tokenizer; it must be one of its tokens"),
    read("chat_template_path", "the chat template of the tokenizer: path of a Jinja file"),
)

SFT: tuple[Setting, ...] = (
    *ALL,
    *_TOKENS,
    read("dataset_text_field", "the column of plain text; ignored if rows have no such column"),
    refused(
        "dataset_kwargs", "rows are always tokenized by the trainer, unless they are tokenized already",
        "remove it", None, {}, {"skip_prepare_dataset": True}, {"skip_prepare_dataset": False},
    ),
    harmless("shuffle_dataset", "each epoch is a new permutation unless `shuffle` is False"),
    harmless("packing eval_packing", _PACKED + "; batch sizes count examples, not packed rows"),
    refused(
        "packing_strategy", "examples are never split or joined across rows",
        "remove it", None, "bfd",
    ),
    refused(
        "completion_only_loss assistant_only_loss", "only the responses of the assistant are trained",
        "remove it; to train on all tokens, pass rows of `text`", None, True,
    ),
    refused("loss_type", "SFT has one loss", "remove it", None, "nll", "chunked_nll"),
)  # fmt: skip

PREFERENCE: tuple[Setting, ...] = (
    *ALL,
    harmless(
        "precompute_ref_log_probs",
        "reference log-probs are always computed once, before training, and kept",
    ),
    refused(
        "reference_free", "every loss has a reference model", "remove it", None, False
    ),
    refused(
        "loss_weights", "there is one preference loss, of weight 1",
        "use sft_loss_weight with sft_reduction='token_mean' for the weight of an SFT loss", None, [1.0],
    ),
    Setting(
        ("f_divergence_type",), "refused", _OTHER_LOSS, "remove it",
        taken=(None, "reverse_kl"),
    ),
    harmless("f_alpha_divergence_coef", "it belongs to another `f_divergence_type`"),
    refused("ld_alpha", _OTHER_LOSS, "remove it", None, 1.0),
    refused("use_weighting", _OTHER_LOSS, "remove it", None, False),
    harmless("discopop_tau", "it belongs to a loss that is not supported"),
    refused(
        "sync_ref_model", "the reference model is fixed",
        "train in rounds: pass the model of one round as `model` and `ref_model` of the next", None, False,
    ),
    harmless("ref_model_mixup_alpha ref_model_sync_steps", _SYNC),
)  # fmt: skip

REWARD: tuple[Setting, ...] = (
    *ALL,
    *_TOKENS,
    refused("center_rewards_coefficient", _OTHER_LOSS, "remove it", None, 0, 0.0),
)
