"""Reward models: sequence classifiers of transformers, one score per attribute.

Other tools load them with `AutoModelForSequenceClassification.from_pretrained` and get the same scores. The
config says how scores become one reward: `id2label` has the names of the attributes, and `reward_weights`
their weights by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    set_seed,
)

from rpo_trainer.attributes import resolve_weights
from rpo_trainer.data import end_token_ids
from rpo_trainer.errors import ModelError
from rpo_trainer.models.multimodal import is_composite, text_decoder
from rpo_trainer.models.sharding import loading_unsharded
from rpo_trainer.models.unwrap import is_classifier, transformers_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONE_REWARD = ("reward",)  # the default


def as_reward_model(
    model: nn.Module,
    *,
    attributes: Sequence[str] | None = None,
    weights: str | Mapping[str, float] | None = None,
    seed: int = 0,
) -> Any:
    """Create a reward model with these attributes from a causal language model or a reward model.

    The decoder of a language model gets a new head, initialized with `seed`. For a multimodal model without a
    classifier class, only the text decoder is used, with the text configuration. A sequence classifier is
    kept as it is.

    Args:
        attributes: names of the scores, in order; None: those of the classifier, or one reward.
        weights: see `resolve_weights`; None: those of the classifier, else the mean.

    Raises:
        ModelError: a family without a sequence classifier; a classifier with other attributes; a
            language model inside a wrapper.
        RecipeError: weights that do not match the attributes.
    """
    if is_classifier(model):
        names = _names_of(transformers_model(model), attributes)
    else:
        names = tuple(attributes or ONE_REWARD)
        model = _with_head(model, names, seed)
    config = transformers_model(model).config
    known = getattr(config, "reward_weights", None)
    if weights is None and isinstance(known, Mapping) and set(known) == set(names):
        weights = known
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.reward_weights = resolve_weights(weights, names)
    return model


def _names_of(classifier: Any, attributes: Sequence[str] | None) -> tuple[str, ...]:
    own = attributes_of(classifier)
    unnamed = own == tuple(f"LABEL_{number}" for number in range(len(own)))
    if attributes is None:
        return ONE_REWARD if unnamed and len(own) == 1 else own
    if len(own) != len(attributes) or (own != tuple(attributes) and not unnamed):
        raise ModelError(
            f"the reward model scores {', '.join(own)}, not {', '.join(attributes)}",
            code="model.attribute-mismatch",
            where="attributes",
            why="each score was trained for one attribute and is weighted by that attribute's name",
            fix="list its attributes in its order, or start from a language model",
        )
    return tuple(attributes)


def _with_head(model: Any, names: Sequence[str], seed: int) -> Any:
    source = transformers_model(model)
    if source is not model:
        raise ModelError(
            f"a language model inside a {type(model).__name__} cannot become a reward model",
            code="model.wrapped-language-model",
            why="the head is replaced, which the wrapper does not support",
            fix="pass the language model itself, and an adapter as peft_config",
        )
    factory: Any = AutoModelForSequenceClassification
    config, decoder = source.config, source.base_model
    text_part = (
        is_composite(config) and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    if text_part:  # its text decoder may have a classifier class
        config, decoder = config.get_text_config(), text_decoder(source)
    config.num_labels = len(names)
    try:
        # The decoder exists already; its placeholder must not be distributed to the ranks.
        with loading_unsharded(), init_empty_weights(include_buffers=False):
            classifier = factory.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence classifier for {config.model_type} models",
            code="model.no-sequence-classifier",
            why="reward models are sequence classifiers",
            fix="use a model of another family",
        ) from error
    parameter = next(decoder.parameters())
    setattr(classifier, classifier.base_model_prefix, decoder)
    missing = [
        name
        for name, part in classifier.named_children()
        if part is not decoder and any(True for _ in part.parameters())
    ]
    if missing != ["score"]:
        raise ModelError(
            f"the sequence classifier of {config.model_type} models is not a decoder with a head",
            code="model.no-sequence-classifier",
            why=f"the language model has no weights for {', '.join(missing)}",
            fix="use a model of another family",
        )
    classifier.score.to_empty(device=parameter.device).to(parameter.dtype)
    set_seed(seed)
    for weights in classifier.score.parameters():
        nn.init.normal_(weights, std=getattr(config.get_text_config(), "initializer_range", 0.02))
    classifier.name_or_path = source.name_or_path
    classifier._rpo_made = tuple(f"score.{name}" for name, _ in classifier.score.named_parameters())
    if hasattr(source, "_rpo_complete"):
        classifier._rpo_complete = source._rpo_complete
    classifier._rpo_text_part = text_part
    classifier.train(source.training)
    return classifier


def with_pad_token(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> PreTrainedTokenizerBase:
    """Choose a pad token that is not an end token, and set it in the model's config.

    Classifiers of transformers read their scores at the last token that is not padding. If responses end with
    the pad token, that is the token before the end. So a missing pad token, or one that is an end token,
    becomes the unknown or the begin token.

    Returns:
        `tokenizer` itself, or a copy.

    Raises:
        ModelError: there is no such token.
    """
    config = transformers_model(model).config
    ends = end_token_ids(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        others = (tokenizer.unk_token, tokenizer.bos_token)
        free = [t for t in others if t and tokenizer.convert_tokens_to_ids(t) not in ends]
        if not free:
            raise ModelError(
                "the tokenizer has no pad token, or one that is an end token",
                code="tokenizer.no-pad-token",
                why="a classifier reads its scores at the last token that is not padding",
                fix="set pad_token in tokenizer_config.json to a token that is not an end token",
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = free[0]
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def attributes_of(model: nn.Module) -> tuple[str, ...]:
    """Return the attributes of a reward model, in the order of its scores."""
    labels = transformers_model(model).config.id2label
    return tuple(str(labels[number]) for number in sorted(labels))


def weights_of(model: nn.Module) -> Tensor:
    """Return `[A]`, float64: the weight of each score in the reward; equal if the config has none."""
    names = attributes_of(model)
    known = getattr(transformers_model(model).config, "reward_weights", None)
    weights = resolve_weights(known, names)
    return torch.tensor([weights[name] for name in names], dtype=torch.float64)
