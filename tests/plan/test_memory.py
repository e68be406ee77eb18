"""Simulated memory, compared with counts in closed form and with a process that trains."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rpo_trainer.errors import RecipeError
from rpo_trainer.models.reward_model import as_reward_model
from rpo_trainer.plan import StepMemory, step_memory
from rpo_trainer.plan.memory import optimizer_bytes
from rpo_trainer.plan.nf4 import hold_in_nf4, nf4_bytes
from rpo_trainer.runtime import distributed
from tests.distributed.launch import require, run, torchrun
from tests.distributed.worker import ENGINES
from tests.plan import process
from tests.raising import raises

V, H, INNER, LAYERS = 96, 32, 48, 3


def llama(dtype: torch.dtype = torch.float32) -> Any:
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return _in(config, dtype)


def _in(config: LlamaConfig, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def examples(count: int, prompt: int = 40, response: int = 30) -> list[dict[str, Any]]:
    ids = [1] * response
    return [
        {
            "prompt_ids": [1] * prompt,
            "response_ids": [ids, ids],
            "response_mask": [ids, ids],
        }
        for _ in range(count)
    ]


PER_LAYER = 4 * H * H + 3 * H * INNER + 2 * H
WEIGHTS = 2 * V * H + LAYERS * PER_LAYER + H


def memory(make: Any = llama, count: int = 2, **settings: Any) -> StepMemory:
    return step_memory(make, examples(count), **settings)


def test_weights_gradients_and_state_are_counted_exactly() -> None:
    found = memory()
    buffers = sum(b.numel() * b.element_size() for b in llama().buffers())
    assert found.parameters == 4 * WEIGHTS + buffers
    assert found.gradients == 4 * WEIGHTS
    # Adam: two moments of four bytes, and a step counter per tensor.
    assert 0 <= found.optimizer - 8 * WEIGHTS <= 4 * len(list(llama().parameters()))
    assert found.layer == 4 * PER_LAYER
    assert found.root == found.parameters - LAYERS * 4 * PER_LAYER


@pytest.mark.slow
def test_no_tensor_is_really_made() -> None:
    def huge(dtype: torch.dtype) -> Any:
        return _in(
            LlamaConfig(
                vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                num_attention_heads=64, num_key_value_heads=8,
            ),
            dtype,
        )  # fmt: skip

    found = memory(huge, count=1)
    assert found.parameters / 4 == pytest.approx(70.55e9, rel=0.01)


@pytest.mark.parametrize(
    ("optim", "bytes_"), [("sgd", 0), ("adamw_torch_fused", 8), ("adamw_8bit", 2), ("lion_8bit", 1)]
)
def test_state_of_optimizers(optim: str, bytes_: int) -> None:
    slack = 4 * len(list(llama().parameters()))
    assert 0 <= memory(optim=optim).optimizer - bytes_ * WEIGHTS <= slack


def test_the_process_keeps_its_device(monkeypatch) -> None:
    """A run first checks the free disk space, which needs this estimate, and then samples: on its GPU."""
    PartialState()
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))
    monkeypatch.setitem(PartialState._shared_state, "process_index", 3)
    with torch.device("meta"):
        model = llama()
    assert optimizer_bytes(model, "adamw_torch")
    assert distributed.device() == torch.device("cuda") and distributed.rank() == 3


def test_an_optimizer_of_unknown_size_is_refused() -> None:
    with raises("plan.unknown-optimizer", RecipeError, where="optim") as error:
        memory(optim="apollo_adamw")
    assert "'apollo_adamw'" in error.value.what


def test_activations_follow_the_tokens_and_checkpointing() -> None:
    one, two = memory(count=4).activations, memory(count=8).activations
    assert 1.8 < two / one < 2.2
    assert memory(count=8, checkpointing=True).activations < 0.7 * two


def test_gradients_are_held_through_an_accumulated_step() -> None:
    """The first backward creates gradients while activations are freed; the second needs room for both."""
    assert memory(accumulation=2).activations > memory().activations
    assert memory(accumulation=8) == memory(accumulation=2)


def test_an_adapter_has_gradients_of_its_own_weights_alone() -> None:
    def adapted(dtype: torch.dtype) -> Any:
        return get_peft_model(
            llama(dtype), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        )

    found = memory(adapted)
    assert found.gradients == 4 * LAYERS * 2 * 2 * H
    assert found.parameters == memory().parameters + found.gradients


def lora(dtype: torch.dtype) -> Any:
    return get_peft_model(
        llama(dtype), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )


@pytest.mark.parametrize("half_weights", [False, True])
def test_frozen_weights_are_counted_in_their_dtype(half_weights: bool) -> None:
    """Two bytes for each frozen weight, whether an engine shards them or not; four for the adapter's."""
    found = memory(lora, frozen=torch.bfloat16, autocast=torch.bfloat16, half_weights=half_weights)
    buffers = sum(b.numel() * b.element_size() for b in llama().buffers())
    assert found.gradients == 4 * LAYERS * 2 * 2 * H
    assert found.parameters == pytest.approx(2 * WEIGHTS + found.gradients + buffers, abs=buffers)
    plain = memory(lora, autocast=torch.bfloat16)
    assert plain.parameters == 4 * WEIGHTS + found.gradients + buffers
    assert (
        plain.root + plain.layer == found.root + found.layer
    )  # what is gathered: see `per_device`


@pytest.mark.slow
def test_an_8b_model_has_15_gib_of_frozen_weights() -> None:
    def model(dtype: torch.dtype) -> Any:
        config = LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        )  # fmt: skip
        spec = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(_in(config, dtype), spec)

    found = memory(model, count=1, frozen=torch.bfloat16, autocast=torch.bfloat16)
    assert found.parameters / 2**30 == pytest.approx(15.1, abs=0.2)


def test_the_logit_tile_is_bounded() -> None:
    """Twice the tokens need twice the logits, but not with a small tile."""

    def growth(**settings: Any) -> int:
        return memory(count=60, **settings).activations - memory(count=30, **settings).activations

    logits = 30 * 2 * 30 * V * 4
    assert growth() - growth(logits_chunk_bytes=65536) > 0.5 * logits


def test_half_precision_weights_are_still_reported_as_float32() -> None:
    plain = memory(autocast=torch.bfloat16)
    half = memory(autocast=torch.bfloat16, half_weights=True)
    assert half.gradients == plain.gradients
    assert half.optimizer == pytest.approx(plain.optimizer, rel=0.01)
    assert half.activations < plain.activations  # no casts of the weights are kept


def test_the_reference_pass_needs_no_activations() -> None:
    found = step_memory(llama, examples(4), reference_batch=examples(4))
    assert 0 < found.reference < found.activations


def test_a_base_in_4_bits_is_counted_so() -> None:
    """All linear layers except the head; LoRA, embeddings and norms are float32."""

    def held(dtype: torch.dtype) -> Any:
        model = get_peft_model(llama(dtype), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        hold_in_nf4(model, dtype)
        return model

    linear = [4 * LAYERS * [H * H], 3 * LAYERS * [H * INNER]]
    sizes = [n for part in linear for n in part]
    found = memory(held)
    assert found.unsharded == sum(map(nf4_bytes, sizes))
    adapters = 4 * (LAYERS * 2 * 2 * H + 2 * (H + V))
    assert found.gradients == adapters
    outside = 4 * (2 * V * H + LAYERS * 2 * H + H)  # embeddings, head, norms
    buffers = sum(b.numel() * b.element_size() for b in llama().buffers())
    assert found.parameters == found.unsharded + outside + adapters + buffers
    half = memory(held, autocast=torch.bfloat16, half_weights=True)
    assert half.unsharded == found.unsharded
    assert half.parameters == pytest.approx(found.parameters, rel=0.01)


def test_a_reward_model_has_a_head_of_its_own_and_no_logits() -> None:
    def scored(dtype: torch.dtype) -> Any:
        return as_reward_model(llama(dtype), attributes=("quality", "depth"))

    found, policy = memory(scored), memory()
    assert found.gradients == policy.gradients - 4 * V * H + 4 * 2 * H
    assert found.activations < policy.activations


ALL = {"r": 16, "target_modules": "all-linear"}
SINGLE: dict[str, dict[str, Any]] = {
    "plain": {}, "accumulation": {"accumulation": 2}, "checkpointing": {"checkpointing": True},
    "bfloat16": {"bf16": True}, "LoRA": {"lora": ALL},
    "LoRA in bfloat16": {"lora": ALL, "bf16": True, "frozen": True},
    "reward": {"kind": "reward"},
    "QLoRA": {"lora": ALL, "nf4": True, "bf16": True, "micro_batch": 8},
}  # fmt: skip

# The effect of these is also tested on the simulation alone.
SIMULATED = ("accumulation", "checkpointing", "bfloat16", "LoRA", "LoRA in bfloat16", "reward")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plan")
    LlamaForCausalLM(process.model_config()).save_pretrained(folder)
    return str(folder)


def held_and_planned(settings: dict[str, Any], folder: str, record: Any) -> list[tuple[int, int]]:
    """Bytes of each rank beyond its libraries: measured and planned."""
    settings = {**process.SETTINGS, **settings, "folder": folder}
    command = ["tests.plan.process", json.dumps(settings)]
    alone = [sys.executable, "-m", *command]
    # An allocator that returns freed memory: the rest is held by tensors.
    eager = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = run(alone if settings["engine"] == "single" else torchrun(*command), **eager)
    assert done.returncode == 0, done.stdout[-3000:]
    found = re.findall(r"^held (\d+) of (\d+)$", done.stdout, re.MULTILINE)
    assert len(found) == (1 if settings["engine"] == "single" else process.RANKS)
    planned = process.planned(settings)
    for held, _ in found:
        record("table: held, by what was planned", f"{settings} {int(held) / planned:.3f}")
    return [(int(held), planned) for held, _ in found]


LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="glibc's allocator and Linux's units"
)


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.long] * (name in SIMULATED)
            + [pytest.mark.extras("bitsandbytes")] * ("nf4" in SINGLE[name]),
        )
        for name in SINGLE
    ],
)
def test_a_process_that_trains_holds_what_was_planned(
    name: str, start: str, record_property: Any
) -> None:
    # The process also keeps buffers of bfloat16 products (benchmarks/README.md).
    buffers = 100 * 2**20 if name == "LoRA in bfloat16" else 0
    for held, planned in held_and_planned(SINGLE[name], start, record_property):
        assert held == pytest.approx(planned + buffers, rel=0.15)


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name in ("zero2", "zero3")))
        for name in ENGINES
    ],
)
def test_a_rank_holds_what_was_planned(engine: str, start: str, record_property: Any) -> None:
    require(engine)
    # Under FSDP2 the ranks hold 20 to 23% more on a CPU, 6 to 8% of it since token statistics are computed.
    within = 0.25 if engine == "fsdp2" else 0.15
    for held, planned in held_and_planned({"engine": engine}, start, record_property):
        assert held == pytest.approx(planned, rel=within)
