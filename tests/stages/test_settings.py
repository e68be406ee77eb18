"""The fields of a stage that its trainer's config has under the same name."""

from __future__ import annotations

import pytest

from rpo_trainer.recipe.schema import STAGE_KINDS
from rpo_trainer.stages.settings import copied_fields

ALL = {
    "max_length", "truncation", "global_batch_size", "micro_batch_tokens", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm",
    "optim", "logging_steps", "save_total_limit", "report_to", "on_nonfinite", "max_skipped_steps",
    "router_aux_loss_coef",
}  # fmt: skip
PREFERENCE = {
    "beta", "loss_type", "sft_loss_weight", "sft_reduction", "average_logps", "step0_check",
    "disable_dropout",
}  # fmt: skip
OWN = {
    "sft": set(),
    "dpo": {*PREFERENCE, "label_smoothing"},
    "rpo": {*PREFERENCE, "reward_scale"},
    "reward": {
        "objective", "attributes", "reward_weights", "rating_range", "margin_scale", "disable_dropout",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_fields_with_the_name_of_a_training_argument_are_copied(kind: str) -> None:
    assert copied_fields(kind) == ALL | OWN[kind]
