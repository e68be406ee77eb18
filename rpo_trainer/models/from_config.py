"""Models created from a configuration: class, fields, random weights."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from rpo_trainer.errors import ModelError, last_line
from rpo_trainer.models.dtypes import cast_weights
from rpo_trainer.models.multimodal import (
    CLASSIFIER,
    language_model_class,
    random_model,
    require_text_forward,
)
from rpo_trainer.models.sharding import loading_unsharded
from rpo_trainer.runtime.file_errors import device_failed, require_sizes

NEEDED = "nothing can be trained or measured without it"
_CONFIGURATION_ERRORS = (ValueError, TypeError, KeyError, ArithmeticError, AttributeError)
# Fields that configurations accept but do not save.
_ALSO_TAKEN = frozenset({"attn_implementation", "rope_scaling", "rope_theta"})


def auto_class(config: Any, *, reward: bool, where: str) -> Any:
    """Return the class to load a checkpoint with: sequence classifiers are reward models, others policies.

    Args:
        config: the checkpoint's.
        reward: accept a reward model, or a policy to create one from.

    Raises:
        ModelError: a reward model where a policy is needed (its language head would be random), or a model
            that cannot run on text only (see `language_model_class`).
    """
    names = map(str, getattr(config, "architectures", None) or ())
    if not any(name.endswith(CLASSIFIER) for name in names):
        return language_model_class(config, where)
    if not reward:
        raise ModelError(
            "this is a reward model (a sequence classifier), not a policy",
            code="model.not-a-policy",
            where=where,
            why="it has no language head, so it cannot compute log-probs",
            fix="start from a causal language model",
        )
    return AutoModelForSequenceClassification


def make_config(settings: dict[str, Any]) -> Any:
    """Create a configuration from its fields; ModelError if one is unknown or the values do not fit."""
    where = "model.from_config"
    try:
        known = AutoConfig.for_model(settings["model_type"])
        config = AutoConfig.for_model(**settings)
    except (*_CONFIGURATION_ERRORS, StrictDataclassError) as error:
        # For an unknown model_type, the list of all known ones follows.
        what = last_line(error).split(" Should contain one of")[0]
        raise ModelError(
            f"this is not a model configuration: {type(error).__name__}: {what}",
            code="model.bad-config",
            where=where,
            why=NEEDED,
            fix="use the fields of the transformers configuration, including `model_type`",
        ) from error
    for name in settings:
        if name in _ALSO_TAKEN or name in known.to_dict() or hasattr(known, name):
            continue
        near = difflib.get_close_matches(name, known.to_dict(), n=1)
        raise ModelError(
            f"a {settings['model_type']} has no field `{name}`",
            code="model.unknown-config-field",
            where=where,
            why="it would be ignored",
            fix=f"did you mean `{near[0]}`?" if near else "remove it",
        )
    return require_sizes(config, where)


def make_random_model(
    settings: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32
) -> Any:
    """Create a model of this configuration with weights drawn with `seed`, the same in every dtype."""
    config = make_config(settings)
    set_seed(seed)
    factory = auto_class(config, reward=False, where="model.from_config")
    try:
        with loading_unsharded():  # sharded, each rank would draw different numbers
            model = random_model(factory, config, dtype=torch.float32)
            model = cast_weights(model, dtype)
    except (*_CONFIGURATION_ERRORS, RuntimeError) as error:
        if device_failed(error):
            raise
        raise ModelError(
            f"no model can be created from this configuration: {type(error).__name__}: "
            f"{last_line(error).split(' Model type should be one of')[0]}",
            code="model.bad-config",
            where="model.from_config",
            why=NEEDED,
            fix="fix the field named above, or use the configuration of an existing model",
        ) from error
    require_text_forward(model, "model.from_config")
    return model
