"""Noise in training is disabled where required, in every family, and nothing else of the model changes."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rpo_trainer.errors import StepZeroError
from rpo_trainer.trainers import RewardConfig, RewardTrainer
from rpo_trainer.trainers import noise as module
from rpo_trainer.trainers.noise import disable_noise, is_noisy, noise_in
from rpo_trainer.trainers.step_zero import plain_sums
from tests.families import tiny_model
from tests.raising import raises
from tests.small_models import VOCABULARY, make_model
from tests.trainers.plain import make_rows

WIDTH = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
COMMON = {
    **WIDTH, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 32, "pad_token_id": 0,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "num_local_experts": 4,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# Sources of noise: modules, numbers in modules, configs that a forward reads, sampling.
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "nn.Dropout": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "attention": ("llama", {**COMMON, "attention_dropout": 0.3}),
    "residual": ("seed_oss", {**COMMON, "residual_dropout": 0.3, "attention_dropout": 0.0}),
    "layer drop": ("opt", {**WIDTH, "ffn_dim": 32, "word_embed_proj_dim": 32, "layerdrop": 0.5}),
    "activation": ("bart", {**SEQ2SEQ, "activation_dropout": 0.3, "decoder_layerdrop": 0.3}),
    "jitter": ("mixtral", {**COMMON, "router_jitter_noise": 0.3}),
    "read from the config": (
        "falcon", {**WIDTH, "hidden_dropout": 0.3, "attention_dropout": 0.3, "alibi": True},
    ),
    "config by another name": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
            "attention_types": [[["global", "local"], 1]], "attention_dropout": 0.3,
            "resid_dropout": 0.0, "embed_dropout": 0.0,
        },
    ),
    "hidden": ("gpt_neox", {**WIDTH, "intermediate_size": 32, "hidden_dropout": 0.3}),
    "sampled experts": (
        "phimoe", {**COMMON, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
    ),
}  # fmt: skip


def made(family: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def logits(model: Any, seed: int, training: bool) -> torch.Tensor:
    model.train(training)
    torch.manual_seed(seed)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 23)[None], use_cache=False).logits
    return found


def assert_turned_off(model: Any) -> None:
    """Two forwards in training are bitwise those of eval; the config to save is unchanged."""
    before, config = logits(model, 0, False), model.config.to_dict()
    disable_noise(model, "a test")
    again = copy.deepcopy(model)  # as in a reference pass
    for one in (model, again):
        for seed in (0, 1):
            assert torch.equal(logits(one, seed, True), before)
        assert torch.equal(logits(one, 0, False), before)
        assert one.config.to_dict() == config


@pytest.mark.parametrize("place", PLACES)
def test_noise_is_off_wherever_it_lives(place: str) -> None:
    family, settings = PLACES[place]
    model = made(family, settings)
    assert noise_in(model)
    assert not torch.equal(logits(model, 0, True), logits(model, 1, True))
    assert_turned_off(model)


def test_dropout_of_an_adapter_is_named_for_what_it_is() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_model(), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.25)
    )
    assert noise_in(model) == {"lora_dropout": 0.25}


def test_settings_of_the_config_still_act_below_a_view(tmp_path: Any) -> None:
    model = made(*PLACES["read from the config"])
    disable_noise(model, "a test")
    model.config.use_cache = False
    layer = model.transformer.h[0]
    assert layer.config.use_cache is False and layer.config.hidden_dropout == 0.0
    assert isinstance(layer.config, type(model.config))
    model.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).hidden_dropout == 0.3


# --- every family ---

SIZES = {
    32: "hidden_size d_model n_embd embedding_size hidden_dim ffn_dim intermediate_size dff n_inner "
    "decoder_ffn_dim encoder_ffn_dim moe_intermediate_size word_embed_proj_dim lru_width "
    "shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_experts_per_tok "
    "moe_topk moe_k num_decoder_layers num_encoder_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_key_value_heads num_experts num_local_experts n_routed_experts num_kv_heads",
    8: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim rotary_dim",
    16: "q_lora_rank kv_lora_rank",
    1: "n_group topk_group",
    VOCABULARY: "vocab_size",
    64: "max_position_embeddings n_positions n_ctx",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}


def small_noisy(family: str) -> Any:
    """A small model of a family with all noise enabled; None: it has none, or the sizes do not fit."""
    try:
        defaults = CONFIG_MAPPING[family]().to_dict()
        sizes = {name: SMALL[name] for name in SMALL if isinstance(defaults.get(name), int)}
        on = {
            name: 0.3 for name, value in defaults.items()
            if module._NAMES.search(name) and type(value) in (int, float) and 0 <= value < 1
        }  # fmt: skip
        layers = {
            name: value[:2] for name, value in defaults.items()
            if name in ("layer_types", "mlp_layer_types") and isinstance(value, list)
        }  # fmt: skip
        tokens = {
            name: n for n, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id"))
        }
        decoder = {"is_decoder": True} if "is_decoder" in defaults else {}
        settings = {**sizes, **on, **layers, **tokens, **decoder}
        with torch.device("meta"):
            size = sum(p.numel() for p in made(family, settings).parameters()) if on else 0
        return made(family, settings) if 0 < size < 2e6 else None
    except Exception:  # any error of a family about sizes
        return None


@pytest.mark.slow
def test_noise_is_off_in_every_family() -> None:
    tried = []
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = small_noisy(family)
        try:
            noisy = model is not None and is_noisy(model)
        except Exception:  # sizes that do not fit, detected late
            continue
        if noisy:
            assert_turned_off(model)
            tried.append(family)
    assert len(tried) > 60, tried


# --- warnings of trainers ---


def test_what_is_left_on_is_named(make_trainer: Any, caplog: Any) -> None:
    rows = {"sft": make_rows(0, (1,) * 4), "dpo": make_rows(0, (2,) * 4)}
    for kind, settings in (("sft", {}), ("dpo", {"disable_dropout": False}), ("dpo", {})):
        caplog.clear()
        with caplog.at_level(logging.INFO, "rpo_trainer"):
            make_trainer(kind, make_model("llama", attention_dropout=0.25), rows[kind], **settings)
        (said,) = [r for r in caplog.records if "noise" in r.getMessage()]
        off = kind == "dpo" and not settings
        assert "attention_dropout 0.25" in said.getMessage()
        assert (said.levelname == "WARNING") == off


def test_reward_training_has_none(tokenizer: Any, tmp_path: Any) -> None:
    trainer = RewardTrainer(
        made(*PLACES["jitter"]),
        args=RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=make_rows(0, (2,) * 4),
        processing_class=tokenizer,
    )
    assert not is_noisy(trainer.model) and not noise_in(trainer.model)


# --- the reason of the step-0 check ---


def test_noise_without_a_name_is_called_noise(make_trainer: Any) -> None:
    trainer = make_trainer("dpo", make_model(), make_rows(0, (2,) * 4))

    def noise(module: Any, args: Any, output: Any) -> Any:
        return output + 0.5 * torch.randn_like(output) if module.training else output

    trainer.model.model.norm.register_forward_hook(noise)
    with raises("training.step-zero", StepZeroError, cause="noise"):
        trainer.train()


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_batch_that_is_not_exact_is_no_stale_cache(layout: str, make_trainer: Any) -> None:
    """A model whose outputs depend on the batch size; the reference had one response each."""
    trainer = make_trainer(
        "dpo", make_model(), make_rows(0, (2,) * 4), layout=layout, global_batch_size=4,
        per_device_train_batch_size=4, reference_batch_tokens=1,
    )  # fmt: skip

    def leak(module: Any, args: Any, output: Any) -> Any:
        return output + 0.3 * (output.shape[0] * output.shape[1] > 45)

    trainer.model.model.norm.register_forward_hook(leak)
    with raises("training.step-zero", StepZeroError, cause="layout"):
        trainer.train()


def test_a_forward_that_is_random_in_eval_mode_is_reported(make_trainer: Any) -> None:
    trainer = make_trainer(
        "dpo", make_model(), make_rows(0, (2,) * 4), reference_batch_tokens=10**6
    )
    trainer.before_training(None)
    trainer.policy_ready(None)

    def noise(module: Any, args: Any, output: Any) -> Any:
        return output + 0.5 * torch.randn_like(output)

    trainer.model.model.norm.register_forward_hook(noise)
    with raises("training.step-zero", StepZeroError, cause="not-deterministic"):
        trainer.train()


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_plain_sums_are_those_of_the_step(layout: str, make_trainer: Any) -> None:
    from rpo_trainer.step.forward import token_logprobs
    from rpo_trainer.step.logprobs import response_sums
    from rpo_trainer.step.packing import pack

    rows = make_rows(3, (2, 3, 2), spans=True)
    trainer = make_trainer("rpo", make_model(), make_rows(3, (2,) * 4, rewards=True), layout=layout)
    batch = pack(rows, layout)
    with torch.no_grad():
        sums = response_sums(
            token_logprobs(trainer.model, batch.model_inputs), batch.response_index, 7
        )
        torch.testing.assert_close(plain_sums(trainer.model, batch), sums, atol=1e-4, rtol=1e-4)


def test_what_draws_is_held_though_two_forwards_may_happen_to_agree() -> None:
    """The router of Phi-3.5-MoE samples between experts with close scores, which few tokens have."""
    model = tiny_model("phimoe")
    disable_noise(model, "the test has none")
    ids = torch.arange(6, 90)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        for seed in range(5):
            torch.manual_seed(seed)
            assert torch.equal(model.train()(input_ids=ids, use_cache=False).logits, expected)
