"""`model` of a recipe, and `peft` of a stage."""

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
            "add `model_type: ...`, for example `model_type: llama`",
            "it selects the model class of transformers",
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
            why="a model with random weights has no tokenizer",
            fix="add `tokenizer: ...` under `model`: a path, a hub name, or `characters`",
        ),
    )  # fmt: skip

    name_or_path: Text | None = Field(
        None, description="directory or hub name of a model with safetensors weights"
    )
    from_config: Annotated[dict[str, Any] | None, AfterValidator(_with_model_type)] = Field(
        None,
        description="configuration of a model with random weights, with `model_type`; in place of "
        "`name_or_path`",
    )
    tokenizer: Text | None = Field(
        None,
        description="directory or hub name of the tokenizer, or `characters` (built in, for the "
        "quickstart); default: that of `name_or_path`",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "bfloat16",
        description="dtype of the computation (autocast); trained weights stay float32, because small "
        "updates are lost in bfloat16. `auto`: bfloat16 on a GPU that supports it, else float32",
    )
    chat_template: Text | None = Field(
        None,
        description="path of a Jinja chat template, or a built-in one (`chatml`, `plain`); default: "
        "the tokenizer's own",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="variables of the chat template, such as `enable_thinking: false`; those of a source "
        "or a row take precedence, key by key",
    )
    revision: Text | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(
        False,
        description="run Python code that comes with the model",
    )


class PeftSpec(Spec):
    """An adapter that is trained in place of all weights; other keys are fields of `peft.LoraConfig`."""

    model_config = ConfigDict(extra="allow")
    rules = (parts.merge_agrees,)

    between_stages: Literal["merge", "keep"] = Field(
        "merge",
        description="`merge`: merge the adapter into the weights at the end of the stage; the next stage "
        "starts from the merged model. `keep`: the next stage continues to train the adapter",
    )
    merge: bool | None = Field(
        None,
        description="with `between_stages: keep`: also write the merged model, to `merged`",
    )
    quantization: Literal["nf4"] | None = Field(
        None, description="keep the frozen base weights in 4 bits (QLoRA); requires bitsandbytes"
    )
    frozen_dtype: Literal["auto", "float32"] = Field(
        "auto",
        description="dtype of the frozen base weights; `auto`: that of the arithmetic (`model.dtype`). "
        "Adapter weights are float32 either way",
    )

    def lora_fields(self) -> dict[str, Any]:
        """Return the fields of `peft.LoraConfig`."""
        return dict(self.model_extra or {})
