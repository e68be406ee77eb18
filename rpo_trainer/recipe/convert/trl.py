"""Convert YAML for TRL's command line (`trl sft --config FILE`) to a recipe of one stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe.convert.adapters import LoraNames, put_lora
from rpo_trainer.recipe.convert.arguments import (
    LEFT_OUT,
    NOT_NEEDED,
    STAGE,
    Arguments,
    Defaults,
    put_dtype,
)
from rpo_trainer.recipe.convert.draft import Draft
from rpo_trainer.recipe.convert.foreign_config import ForeignConfig, reasons
from rpo_trainer.recipe.convert.paths import Paths

_RATES = {"sft": 2e-5, "dpo": 1e-6, "reward": 1e-4}
# Keys that only DPO configs have, and those that only SFT configs have.
_OF_DPO = {"beta", "label_smoothing", "ref_model_name_or_path", "rpo_alpha", "loss_weights",
           "precompute_ref_log_probs", "sync_ref_model", "reference_free"}  # fmt: skip
_OF_SFT = {"packing", "assistant_only_loss", "completion_only_loss", "dataset_text_field",
           "max_seq_length", "eval_packing"}  # fmt: skip
_LOSSES = {"sigmoid": "dpo", "ipo": "ipo"}
_CONFIGURATION = "configurations of hub datasets cannot be selected; save the rows to a file"
_LORA = LoraNames(
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save",
    "use_rslora", "use_dora", default_rank=16, alpha_of_rank=0, default_alpha=32,
)  # fmt: skip
_NOT_NEEDED = NOT_NEEDED | reasons(
    [
        ("only assistant turns and responses are trained", ("assistant_only_loss", "completion_only_loss")),
        ("determined by the config of the model", ("model_code_revision", "torch_dtype", "dtype")),
    ]
)  # fmt: skip
_LEFT_OUT = LEFT_OUT | reasons(
    [
        (_CONFIGURATION, ("dataset_config",)),
        ("use `rpo-trainer -v` for debug messages", ("log_level",)),
        ("datasets are not streamed", ("dataset_streaming",)),
        ("set `columns` of the source", ("dataset_text_field",)),
        ("`max_length` limits prompt and response together",
         ("max_prompt_length", "max_completion_length")),
        ("to update the reference model, train in rounds with `repeat`",
         ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")),
        ("other terms of the loss are not supported",
         ("f_divergence_type", "ld_alpha", "use_weighting", "discopop_tau", "center_rewards_coefficient")),
        ("set them in the tokenizer's files", ("eos_token", "pad_token")),
        ("set `model.chat_template` to a Jinja file", ("chat_template_path",)),
        ("only bitsandbytes' NF4 with its defaults is supported",
         ("bnb_4bit_quant_type", "use_bnb_nested_quant")),
    ]
)  # fmt: skip


def convert_trl(
    config: ForeignConfig, paths: Paths, draft: Draft, devices: int | None, kind: str | None
) -> None:
    """Fill the draft from the YAML of TRL's command line.

    Args:
        config: the file.
        paths: paths of the file and the recipe.
        draft: the new recipe.
        devices: the number of GPUs that the file was used with.
        kind: `sft`, `dpo` or `reward`; None: determined by the keys of the file.

    Raises:
        RecipeError: the kind is neither given nor determined by the keys, or the loss has no counterpart.
    """
    kind = kind or _kind(config)
    path, known = paths.converted(str(config.take("model_name_or_path")))
    draft.put(("model", "name_or_path"), path, "model_name_or_path")
    if not known:
        config.differs("model_name_or_path", "not found; correct the path")
    put_dtype(config, draft, "auto", "default of this recipe")
    if config.has("model_revision") and config.take("model_revision") != "main":
        draft.put(("model", "revision"), str(config.take("model_revision")), "model_revision")
    if config.take("trust_remote_code") is True:
        draft.put(
            ("model", "trust_remote_code"), True, "trust_remote_code; remove it unless needed"
        )
    draft.put((*STAGE, "name"), kind)
    draft.put((*STAGE, "kind"), kind)
    if kind == "reward":
        draft.put((*STAGE, "objective"), "bradley_terry")
    files = _data(config, paths, draft)
    if kind == "dpo":
        _preference(config, paths, draft)
    key = "max_seq_length" if config.has("max_seq_length") else "max_length"
    source = key if config.has(key) else "default of TRL"
    draft.put((*STAGE, "max_length"), int(config.number(key, 1024)), source)
    config.take("truncation_mode")
    draft.put((*STAGE, "truncation"), "truncate", "TRL truncates; `drop` drops longer rows")
    defaults = Defaults(learning_rate=_RATES[kind], gradient_checkpointing=True)
    Arguments(config, draft, STAGE, defaults, devices).convert(files, sft=kind == "sft")
    _adapter(config, draft, kind)
    config.skip(_NOT_NEEDED)
    config.leave_out_rest(_LEFT_OUT)


def _kind(config: ForeignConfig) -> str:
    keys = set(config.data)
    if keys & _OF_DPO:
        return "dpo"
    if keys & _OF_SFT:
        return "sft"
    raise RecipeError(
        "the keys do not determine the TRL command of this config",
        code="convert.unknown-kind",
        where=str(config.path),
        fix="give --kind sft, --kind dpo or --kind reward",
    )


def _data(config: ForeignConfig, paths: Paths, draft: Draft) -> list[Path | None]:
    sources, files = [], []
    mixture = config.take("datasets") or []
    place = config
    if isinstance(config.data.get("dataset_mixture"), dict):  # of the Alignment Handbook
        place = config.below("dataset_mixture", config.take("dataset_mixture"))
        mixture = place.take("datasets", [])
    entries = [entry for entry in mixture if isinstance(entry, dict)]
    for number, entry in enumerate(entries):
        below = place.below("datasets", entry, number)
        name = below.take("path") or below.take("id", "")
        source, file = _source(paths, str(name), below.take("split"))
        sources.append(source)
        files.append(file)
        if below.take("config", "default") != "default":
            below.leave_out("config", _CONFIGURATION)
        if below.take("weight", 1.0) != 1.0:
            below.leave_out("weight", "a fraction of the rows; set `max_rows`")
        below.skip({"columns": "only the columns of the data format are read"})
        below.leave_out_rest({"name": _CONFIGURATION})
    if place is not config:
        place.skip({"seed": "the seed of the recipe shuffles the rows"})
        place.leave_out_rest(
            {"test_split_size": "set `data.eval` or `data.eval_fraction` for held-out rows"}
        )
    test_split = config.take("dataset_test_split", "test")
    train_split = config.take("dataset_train_split")
    name = config.take("dataset_name")
    if name is not None and not entries:
        source, file = _source(paths, str(name), train_split)
        sources.append(source)
        files.append(file)
        if str(config.data.get("eval_strategy", "no")) not in ("no", "False") and file is None:
            held_out, _ = _source(paths, str(name), test_split)
            draft.put((*STAGE, "data", "eval"), [held_out], "dataset_test_split")
    if not sources:
        raise RecipeError(
            "this TRL config has no `dataset_name`",
            code="convert.not-a-training-config",
            where=str(config.path),
            why="only configs for training are converted",
            fix="add `dataset_name`, or write a recipe with `rpo-trainer init`",
        )
    draft.put((*STAGE, "data", "train"), sources, "datasets" if entries else "dataset_name")
    return files


def _source(paths: Paths, name: str, split: Any) -> tuple[dict[str, Any], Path | None]:
    if (file := paths.find(name)) is not None:
        return {"path": paths.of_recipe(file)}, file
    return {"path": name} | ({"split": str(split)} if split is not None else {}), None


def _preference(config: ForeignConfig, paths: Paths, draft: Draft) -> None:
    losses = config.names("loss_type") or ["sigmoid"]
    weights = [float(weight) for weight in config.names("loss_weights")] or [1.0] * len(losses)
    weight_of = dict(zip(losses, weights, strict=False))
    sft_weight = weight_of.pop("sft", 0.0)
    if len(weight_of) != 1 or next(iter(weight_of)) not in _LOSSES:
        raise config.unsupported(
            "loss_type",
            f"`loss_type: {', '.join(losses)}`",
            "use `sigmoid` or `ipo`, also with `sft`",
        )
    ((loss, weight),) = weight_of.items()
    draft.put((*STAGE, "loss_type"), _LOSSES[loss], "loss_type")
    if loss == "ipo":
        draft.put((*STAGE, "average_logps"), True, "TRL's ipo averages over the tokens")
    source = "beta" if config.has("beta") else "default of TRL"
    draft.put((*STAGE, "beta"), float(config.number("beta", 0.1)), source)
    alpha = config.number("rpo_alpha", 0.0)
    if sft_weight or alpha:
        key = "loss_weights" if sft_weight else "rpo_alpha"
        draft.put((*STAGE, "sft_loss_weight"), (sft_weight or float(alpha)) / weight, key)
        draft.put((*STAGE, "sft_reduction"), "token_mean", "as in TRL")
    if config.number("label_smoothing", 0.0):
        smoothing = float(config.number("label_smoothing"))
        draft.put((*STAGE, "label_smoothing"), smoothing, "label_smoothing")
    if config.has("ref_model_name_or_path"):
        path, _ = paths.converted(str(config.take("ref_model_name_or_path")))
        draft.put((*STAGE, "reference"), path, "ref_model_name_or_path")


def _adapter(config: ForeignConfig, draft: Draft, kind: str) -> None:
    quantized = config.take("load_in_4bit") is True
    if config.take("use_peft") is not True:
        return
    if kind == "reward":
        config.leave_out("use_peft", "a reward stage trains all weights")
        return
    put_lora(config, draft, STAGE, _LORA)
    if quantized:
        draft.put((*STAGE, "peft", "quantization"), "nf4", "load_in_4bit")
