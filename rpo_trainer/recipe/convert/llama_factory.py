"""Convert LLaMA-Factory YAML to a recipe of one stage."""

from __future__ import annotations

from pathlib import Path

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe.convert.adapters import LoraNames, put_lora
from rpo_trainer.recipe.convert.arguments import (
    LEFT_OUT,
    NOT_NEEDED,
    STAGE,
    Arguments,
    Defaults,
    put_dtype,
    put_eval_fraction,
)
from rpo_trainer.recipe.convert.dataset_info import DatasetInfo
from rpo_trainer.recipe.convert.draft import Draft
from rpo_trainer.recipe.convert.foreign_config import ForeignConfig, reasons
from rpo_trainer.recipe.convert.paths import Paths

_KINDS = {"sft": "sft", "dpo": "dpo", "rm": "reward"}
_INSTEAD = {
    "pt": ("pretraining (`stage: pt`)",
           "train on the text as SFT rows with `format: text` (`rpo-trainer init --kind sft`)"),
    "kto": ("KTO (`stage: kto`)",
            "pair a good response with a bad one for each prompt, and use `stage: dpo`"),
    "ppo": ("PPO (`stage: ppo`)",
            "use an rpo stage with `generate` and `score`, which samples responses and trains on "
            "their rewards"),
}  # fmt: skip
_LOSSES = {
    "orpo": "use `pref_loss: sigmoid` with `pref_ftx`, which needs a reference model",
    "simpo": "use `pref_loss: sigmoid`; `average_logps: true` in the recipe normalizes by length",
    "hinge": "use `pref_loss: sigmoid` or `ipo`",
    "kto_pair": "use `pref_loss: sigmoid`",
}
_MEDIA_KEYS = (
    "freeze_vision_tower", "freeze_multi_modal_projector", "image_max_pixels", "video_max_pixels",
    "image_resolution", "video_fps", "video_maxlen", "train_mm_proj_only",
)  # fmt: skip
_LORA = LoraNames(
    "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora",
    "use_dora", default_rank=8, alpha_of_rank=2,
)  # fmt: skip
_DEFAULTS = Defaults(learning_rate=5e-5, gradient_checkpointing=True)
_NOT_NEEDED = NOT_NEEDED | reasons(
    [
        ("pair accuracy is always logged", ("compute_accuracy",)),
        ("torch's kernels are used", ("use_unsloth", "use_unsloth_gc")),
        ("weights are trained in float32 with autocast", ("upcast_layernorm", "upcast_lmhead_output")),
        ("padding is never trained", ("ignore_pad_token_for_loss",)),
        ("an evaluation reports one loss for all held-out sources", ("eval_on_each_dataset",)),
        ("only text is read", ("media_dir",)),
        ("trained tokens are always counted", ("include_num_input_tokens_seen",)),
        ("safetensors are always written", ("save_safetensors",)),
    ]
)  # fmt: skip
_LEFT_OUT = LEFT_OUT | reasons(
    [
        ("merge the adapter into the model first, and use the merged model",
         ("adapter_name_or_path", "ref_model_adapters", "create_new_adapter")),
        ("an adapter has one learning rate",
         ("loraplus_lr_ratio", "loraplus_lr_embedding")),
        ("set `init_lora_weights` under `peft`", ("pissa_init", "pissa_iter", "pissa_convert")),
        ("prompts are never trained", ("train_on_prompt",)),
        ("every assistant turn is trained; set `weight: 0` on turns to exclude",
         ("mask_history",)),
        ("this optimizer is not supported; AdamW is used",
         ("use_galore", "use_apollo", "use_badam", "use_muon", "use_adam_mini", "galore_target",
          "galore_rank", "galore_scale", "galore_update_interval", "apollo_rank", "apollo_target",
          "badam_mode", "badam_switch_interval", "badam_switch_mode")),
        ("weights stay float32 with autocast", ("pure_bf16",)),
        ("set it in the model's config.json", ("rope_scaling", "shift_attn", "mixture_of_depths")),
        ("add new tokens to the tokenizer and the model first",
         ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")),
        ("other terms of the loss are not supported",
         ("pref_bco_weight", "ld_alpha", "use_asft_loss", "use_dft_loss")),
        ("the reference model is never quantized", ("ref_model_quantization_bit",)),
        ("to sample responses in an evaluation, use `eval: {data, generate, score}`",
         ("predict_with_generate", "eval_num_beams", "max_new_tokens", "temperature", "top_p")),
        ("only bitsandbytes' NF4 is supported",
         ("quantization_method", "quantization_type", "double_quantization")),
        ("layers cannot be added or frozen", ("use_llama_pro", "freeze_trainable_layers",
         "freeze_trainable_modules", "freeze_extra_modules")),
        ("this tracker is not supported; `report_to` takes those of transformers",
         ("use_swanlab", "swanlab_project", "swanlab_run_name", "swanlab_workspace", "swanlab_mode")),
        ("the chat template determines the format of tool calls", ("tool_format",)),
    ]
)  # fmt: skip


def convert_llama_factory(
    config: ForeignConfig, paths: Paths, draft: Draft, devices: int | None
) -> None:
    """Fill the draft from a LLaMA-Factory config.

    Raises:
        RecipeError: the config is not for training, or its method has no counterpart.
    """
    kind = _kind(config)
    _model(config, paths, draft)
    draft.put((*STAGE, "name"), kind)
    draft.put(
        (*STAGE, "kind"), kind, "stage" if config.has("stage") else "default of LLaMA-Factory"
    )
    if kind == "reward":
        draft.put((*STAGE, "objective"), "bradley_terry", "stage: rm")
    files = _data(config, paths, draft, kind)
    if kind == "dpo":
        _preference(config, paths, draft)
    length = int(config.number("cutoff_len", 2048))
    source = "cutoff_len" if config.has("cutoff_len") else "default of LLaMA-Factory"
    draft.put((*STAGE, "max_length"), length, source)
    draft.put(
        (*STAGE, "truncation"), "truncate", "LLaMA-Factory truncates; `drop` drops longer rows"
    )
    Arguments(config, draft, STAGE, _DEFAULTS, devices).convert(files, sft=kind == "sft")
    if config.take("disable_gradient_checkpointing") is True:
        draft.remove((*STAGE, "gradient_checkpointing"))
    if config.has("moe_aux_loss_coef"):
        coefficient = float(config.number("moe_aux_loss_coef"))
        draft.put((*STAGE, "router_aux_loss_coef"), coefficient, "moe_aux_loss_coef")
    _method(config, draft, kind)
    config.skip(_NOT_NEEDED)
    config.leave_out_rest(_LEFT_OUT)


def _kind(config: ForeignConfig) -> str:
    stage = str(config.take("stage", "sft"))
    if stage in _INSTEAD:
        what, fix = _INSTEAD[stage]
        raise config.unsupported("stage", what, fix)
    for key in _MEDIA_KEYS:
        if config.has(key):
            raise config.unsupported(
                key,
                f"training on images, video or audio (`{key}`)",
                "use a text model and text rows",
            )
    if stage not in _KINDS or not config.has("dataset"):
        raise RecipeError(
            "this LLaMA-Factory config has no `dataset`"
            if stage in _KINDS
            else f"`stage: {stage}` is unknown",
            code="convert.not-a-training-config",
            where=config.where("stage"),
            why="only configs for training are converted, not those for export, chat or inference",
            fix="give the config that was used with `llamafactory-cli train`",
        )
    return _KINDS[stage]


def _model(config: ForeignConfig, paths: Paths, draft: Draft) -> None:
    name = str(config.take("model_name_or_path"))
    path, known = paths.converted(name)
    draft.put(("model", "name_or_path"), path, "model_name_or_path")
    if not known:
        config.differs("model_name_or_path", "not found; correct the path")
    put_dtype(config, draft, "bfloat16", "default of this recipe")
    if config.has("model_revision") and config.take("model_revision") != "main":
        draft.put(("model", "revision"), str(config.take("model_revision")), "model_revision")
    if config.take("trust_remote_code") is True:
        draft.put(
            ("model", "trust_remote_code"), True, "trust_remote_code; remove it unless needed"
        )
    template = config.take("template")
    if template is not None:
        config.differs(
            "template",
            "the tokenizer's own chat template is used; compare it with `rpo-trainer check --template "
            f"{path}`, or set `model.chat_template`",
        )
    thinking = config.take("enable_thinking")
    if thinking is None and str(template).endswith("_nothink"):
        thinking = False
    if thinking is False:
        config.differs(
            "template",
            "to disable thinking, add `chat_template_kwargs: {enable_thinking: false}` under `model`, where "
            "the template reads it",
        )


def _data(config: ForeignConfig, paths: Paths, draft: Draft, kind: str) -> list[Path | None]:
    info = DatasetInfo.find(config, paths)
    pairs = kind != "sft"
    sources, files = info.sources("dataset", pairs=pairs)
    held_out, _ = info.sources("eval_dataset", pairs=pairs)
    if config.has("max_samples"):
        for source in (*sources, *held_out):
            source["max_rows"] = int(config.number("max_samples"))
    strategy = config.take("mix_strategy", "concat")
    weights = config.names("interleave_probs")
    if strategy != "concat" and len(weights) == len(sources):
        for source, weight in zip(sources, weights, strict=True):
            source["weight"] = float(weight)
    elif strategy != "concat":
        config.leave_out("mix_strategy", "give each source a `weight`")
    draft.put((*STAGE, "data", "train"), sources, "dataset")
    if held_out:
        draft.put((*STAGE, "data", "eval"), held_out, "eval_dataset")
    put_eval_fraction(config, draft, "val_size")
    return files


def _preference(config: ForeignConfig, paths: Paths, draft: Draft) -> None:
    loss = str(config.take("pref_loss", "sigmoid"))
    if loss in _LOSSES:
        raise config.unsupported("pref_loss", f"`pref_loss: {loss}`", _LOSSES[loss])
    beta_source = "pref_beta" if config.has("pref_beta") else "default of LLaMA-Factory"
    draft.put((*STAGE, "beta"), float(config.number("pref_beta", 0.1)), beta_source)
    if loss == "ipo":
        draft.put((*STAGE, "loss_type"), "ipo", "pref_loss")
        draft.put((*STAGE, "average_logps"), True, "LLaMA-Factory's ipo averages over the tokens")
    weight = config.number("pref_ftx", 0.0)
    if weight:
        draft.put((*STAGE, "sft_loss_weight"), float(weight), "pref_ftx")
        draft.put((*STAGE, "sft_reduction"), "sequence_mean", "as in LLaMA-Factory")
    if config.number("dpo_label_smoothing", 0.0):
        smoothing = float(config.number("dpo_label_smoothing"))
        draft.put((*STAGE, "label_smoothing"), smoothing, "dpo_label_smoothing")
    if config.has("ref_model"):
        path, known = paths.converted(str(config.take("ref_model")))
        draft.put((*STAGE, "reference"), path, "ref_model")
        if not known:
            config.differs("ref_model", "not found; correct the path")


def _method(config: ForeignConfig, draft: Draft, kind: str) -> None:
    method = str(config.take("finetuning_type", "lora"))
    if method in ("freeze", "oft"):
        raise config.unsupported(
            "finetuning_type",
            f"`finetuning_type: {method}`",
            "use `finetuning_type: lora` or `full`",
        )
    bits = config.number("quantization_bit")
    if method == "lora" and kind == "reward":
        config.leave_out("finetuning_type", "a reward stage trains all weights")
        for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target"):
            if config.has(key):
                config.leave_out(key, "a reward stage trains all weights")
        config.take("quantization_bit")
    elif method == "lora":
        put_lora(config, draft, STAGE, _LORA)
        if bits == 4:
            draft.put((*STAGE, "peft", "quantization"), "nf4", "quantization_bit")
        elif bits is not None:
            config.leave_out("quantization_bit", "only 4 bits (`nf4`) are supported")
