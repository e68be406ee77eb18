"""The `model` part of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field
from pydantic_core import InitErrorDetails

from rpo_trainer.recipe import checks
from rpo_trainer.recipe.spec import Spec, Text


class ModelSpec(Spec):
    """The model that the first stage starts from."""

    name_or_path: Text | None = Field(
        None, description="directory or hub name of a model with safetensors weights"
    )
    from_config: dict[str, Any] | None = Field(
        None,
        description="start from random weights: fields of the model's configuration, with "
        "`model_type`",
    )
    tokenizer: Text | None = Field(
        None,
        description="directory or hub name of the tokenizer, or `characters` (the built-in one of "
        "the quickstart); by default that of `name_or_path`",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "bfloat16",
        description="data type of the arithmetic (autocast); weights stay float32, since small steps "
        "are lost in bfloat16 weights. `auto`: bfloat16 on a GPU that has it, else float32",
    )
    chat_template: Text | None = Field(
        None,
        description="path of a Jinja chat template, or a built-in one (`chatml`, `plain`); by "
        "default the tokenizer's own",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="variables of the chat template, such as `enable_thinking: false`, wherever a "
        "conversation is rendered; those of a source and of a row go before these, key by key",
    )
    revision: Text | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(
        False,
        description="run code that comes with the model; off, because it is somebody else's code",
    )

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        return checks.model_checks(raw)
