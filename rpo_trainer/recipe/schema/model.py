"""The `model` part of a recipe, and the `peft` part of a stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from rpo_trainer.recipe.rules import parts
from rpo_trainer.recipe.rules.forms import exactly_one, is_mapping, requires, wrong_value
from rpo_trainer.recipe.schema.spec import Spec, Text


def _with_model_type(config: dict[str, Any] | None) -> dict[str, Any] | None:
    if config is not None and "model_type" not in config:
        raise wrong_value(
            "`from_config` has no `model_type`",
            "add for example `model_type: llama`",
            "it says which of transformers' model classes is made",
            code="recipe.missing-field",
        )
    return config


class ModelSpec(Spec):
    """The model that the first stage starts from."""

    rules = (
        parts.template_variables,
        *exactly_one("name_or_path", "from_config", "`model`"),
        requires(
            "from_config", "tokenizer", when=is_mapping,
            why="a model with random weights brings none, as a directory or a name on the hub does",
            fix="add `tokenizer: ...` under `model`: a path, a hub name, or `characters`",
        ),
    )  # fmt: skip

    name_or_path: Text | None = Field(
        None, description="directory or hub name of a model with safetensors weights"
    )
    from_config: Annotated[dict[str, Any] | None, AfterValidator(_with_model_type)] = Field(
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
        description="dtype of the arithmetic (autocast); trained weights stay float32, since small steps "
        "are lost in bfloat16 weights. `auto`: bfloat16 on a GPU that supports it, else float32",
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


class PeftSpec(Spec):
    """An adapter in place of all weights; every other key is a field of `peft.LoraConfig`."""

    model_config = ConfigDict(extra="allow")
    rules = (parts.merge_agrees,)

    between_stages: Literal["merge", "keep"] = Field(
        "merge",
        description="`merge`: the adapter is merged into the weights at the end of the stage, and the "
        "next one starts from those; `keep`: the next stage trains the adapter itself further",
    )
    merge: bool | None = Field(
        None,
        description="with `between_stages: keep`: write the merged model too, to `merged` beside the "
        "adapter",
    )
    quantization: Literal["nf4"] | None = Field(
        None, description="hold the frozen weights in 4 bits (QLoRA); needs bitsandbytes"
    )
    frozen_dtype: Literal["auto", "float32"] = Field(
        "auto",
        description="dtype of the frozen base weights; `auto`: that of the arithmetic (`model.dtype`). "
        "Adapter weights are float32 either way",
    )

    def lora_fields(self) -> dict[str, Any]:
        """What is `peft.LoraConfig`'s."""
        return dict(self.model_extra or {})
