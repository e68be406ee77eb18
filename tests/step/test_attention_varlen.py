"""Indices and arguments of the variable-length kernel, with a substitute for it without a GPU."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rpo_trainer.step import attention_varlen
from rpo_trainer.step.attention import packed_attention
from rpo_trainer.step.attention_varlen import VarlenIndex
from rpo_trainer.step.batch import AttentionPlan, Segment
from rpo_trainer.step.forward import install, token_logprobs
from rpo_trainer.step.packing import pack
from tests.small_models import VOCABULARY, make_model
from tests.step.test_attention import HEADS, KV_HEADS, PLAN, SINKS, D, T, by_hand
from tests.varlen_kernel import emulate, reference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def indexed(segments: tuple[Segment, ...] = PLAN) -> AttentionPlan:
    return AttentionPlan(segments, VarlenIndex.of(segments))


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, n, T, D, generator=generator, dtype=torch.float64)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )


def test_index_of_a_shared_prompt():
    index = VarlenIndex.of(PLAN)
    assert index.query_starts.tolist() == [0, 7, 12, 15]
    assert index.key_starts.tolist() == [0, 7, 16, 19]
    assert (index.longest_query, index.longest_key) == (7, 9)
    # The second response's keys: the prompt's four, then its own five.
    assert index.keys.tolist() == [*range(7), 0, 1, 2, 3, *range(7, 12), *range(12, 15)]
    assert index.query_starts.dtype == index.key_starts.dtype == torch.int32


def test_nothing_is_gathered_where_nothing_is_shared():
    index = VarlenIndex.of((Segment(0, 5), Segment(5, 9)))
    assert index.query_starts.tolist() == [0, 5, 9]
    assert index.key_starts is None and index.keys is None
    assert (index.longest_query, index.longest_key) == (5, 5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 3}, {"window": 1}, {"window": 7}, {"window": 100}, {"scaling": 0.7},
     {"scaling": 0.2, "window": 2}],
)  # fmt: skip
@pytest.mark.parametrize("asks_for_groups", [True, False])
def test_equals_attention_by_hand(asks_for_groups, settings, tensors, monkeypatch):
    """Grouped keys are passed unchanged, with an argument for it (torch 2.12) or without (2.11)."""
    calls = emulate(monkeypatch)
    monkeypatch.setattr(attention_varlen, "_HAS_GQA_ARGUMENT", asks_for_groups)
    names = {"window": "sliding_window"}
    out, _ = packed_attention(
        nn.Module(), *tensors, None, packing_plan=indexed(),
        **{names.get(name, name): value for name, value in settings.items()},
    )  # fmt: skip
    torch.testing.assert_close(out, by_hand(*tensors, **settings), rtol=1e-12, atol=1e-12)
    assert [("enable_gqa" in call) for call in calls] == [asks_for_groups]
    assert {calls[0][name].shape[1] for name in ("key", "value")} == {KV_HEADS}


@pytest.mark.parametrize("shared", [True, False])
def test_shared_starts_are_passed_only_if_keys_equal_queries(shared, tensors, monkeypatch):
    """torch 2.15 aligns masks differently if both starts are the same tensor."""
    calls = emulate(monkeypatch)
    plan = indexed() if shared else indexed((Segment(0, 7), Segment(7, 15)))
    packed_attention(nn.Module(), *tensors, None, packing_plan=plan)
    assert (calls[0]["cu_seq_q"] is calls[0]["cu_seq_k"]) == (not shared)


def test_gradients_equal_those_of_units(tensors, monkeypatch):
    def gradients() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, _ = packed_attention(
            nn.Module(), *leaves, None, packing_plan=indexed(), sliding_window=4
        )
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        return torch.autograd.grad((out * weights).sum(), leaves)

    units = gradients()
    calls = emulate(monkeypatch)
    for actual, expected in zip(gradients(), units, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("settings", [{"softcap": 1.5}, {"s_aux": SINKS}, {"dropout": 0.5}])
def test_cases_without_the_kernel_use_units(settings, tensors, monkeypatch):
    calls = emulate(monkeypatch)
    packed_attention(nn.Module(), *tensors, None, packing_plan=indexed(), **settings)
    packed_attention(nn.Module(), *tensors, None, packing_plan=AttentionPlan(PLAN))
    assert not calls


@pytest.mark.parametrize(
    ("change", "applies"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float64}, False),
        ({"device": "cpu"}, False),
        ({"size": 256}, True),
        ({"size": 192}, True),
        ({"size": 200}, False),
        ({"size": 264}, False),
        ({"size": 60}, False),
        ({"value_size": 128}, False),
        ({"value_dtype": torch.float32}, False),
        ({"capability": (7, 5)}, False),
        ({"hip": "6.4"}, False),
        ({"flash": False}, False),
        ({"dropout": 0.1}, False),
        ({"softcap": 5.0}, False),
        ({"sinks": torch.zeros(4)}, False),
    ],
)
def test_where_the_kernel_applies(change: dict[str, Any], applies: bool, monkeypatch):
    got = {
        "dtype": torch.bfloat16, "device": "cuda", "size": 64, "value_size": None, "value_dtype": None,
        "capability": (8, 0), "hip": None, "flash": True, **change,
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: got["capability"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: got["flash"])
    monkeypatch.setattr(torch.version, "hip", got["hip"])
    with FakeTensorMode():
        query = torch.empty(1, 4, 9, got["size"], device=got["device"], dtype=got["dtype"])
        value = torch.empty(
            1, 2, 9, got["value_size"] or got["size"], device=got["device"],
            dtype=got["value_dtype"] or got["dtype"],
        )  # fmt: skip
        key = torch.empty(1, 2, 9, got["size"], device=got["device"], dtype=got["dtype"])
    call = {name: got[name] for name in ("dropout", "softcap", "sinks") if name in got}
    assert attention_varlen.applies(query, key, value, **call) == applies


def test_the_real_kernel_takes_our_arguments_without_looking_into_a_tensor():
    """On fake tensors: shapes of forward and backward, without reading values on the host."""
    q, k, v = (
        torch.empty(1, T, n, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    plan = indexed().to(torch.device("meta"))
    out = attention_varlen.attend(
        *(x.transpose(1, 2) for x in (q, k, v)), plan.index, scaling=0.3, sliding_window=4
    )
    assert out.shape == (1, T, HEADS, 8) and out.dtype == torch.bfloat16
    assert out.is_contiguous()  # in the layout of the output projection
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


def test_autocast_has_the_kernel_see_halves(tensors, monkeypatch):
    """Norms of queries and keys return float32, their projections bfloat16."""
    calls = emulate(monkeypatch)
    q, k, v = tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed_attention(
            nn.Module(), q.float(), k.float(), v.bfloat16(), None, packing_plan=indexed()
        )
    assert {calls[0][name].dtype for name in ("query", "key", "value")} == {torch.bfloat16}


def test_a_plan_moves_with_its_batch(monkeypatch):
    examples = [
        {"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]], "response_mask": [[1], [1, 1]]}
    ]
    batch = pack(examples, "shared").model_inputs
    moved = batch.to(torch.device("meta")).plan
    assert moved == batch.plan
    index = moved.index
    assert {x.device.type for x in (index.query_starts, index.key_starts, index.keys)} == {"meta"}
    assert batch.plan.index.keys.tolist() == [0, 1, 2, 0, 1, 3, 4]

    there = pickle.loads(pickle.dumps(batch.plan))  # as from a data loader's worker
    assert torch.equal(there.index.keys, batch.plan.index.keys)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self + 1)
    assert torch.utils.data._utils.pin_memory.pin_memory(batch).plan.index.keys[0] == 1


def test_indices_are_made_once_for_all_layers(monkeypatch):
    calls = emulate(monkeypatch)
    model = make_model("llama", num_hidden_layers=3)
    install(model)
    batch = pack(
        [{"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]], "response_mask": [[1], [1, 1]]}],
        "shared",
    ).model_inputs
    monkeypatch.setattr(VarlenIndex, "of", None)  # only the collator's index
    token_logprobs(model, batch)
    assert len(calls) == 3
    assert len({id(call["cu_seq_k"]) for call in calls}) == 1


def test_compiled_without_a_break_and_not_again_for_every_length(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    @torch.library.custom_op("rpo_trainer_tests::varlen", mutates_args=())
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, max_q: int, max_k: int,
        back: int, ahead: int, enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        return reference(
            q, k, v, q_starts, k_starts, max_q, max_k,
            window_size=(back, ahead), enable_gqa=enable_gqa,
        )  # fmt: skip

    kernel.register_fake(lambda q, *rest: torch.empty_like(q))

    def called(
        *args: Any, scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False
    ) -> Tensor:
        assert scale is None
        return kernel(*args, *window_size, enable_gqa)

    monkeypatch.setattr(attention_varlen, "varlen_attn", called)
    monkeypatch.setattr(
        attention_varlen, "_has_kernel", torch.compiler.assume_constant_result(lambda d: True)
    )
    counter = CompileCounter()
    module = nn.Module()

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        return packed_attention(module, q, k, v, None, packing_plan=plan, sliding_window=5)[0]

    generator = torch.Generator().manual_seed(0)
    for prompt, first, second in ((4, 3, 5), (6, 2, 7), (9, 9, 4), (12, 5, 20)):
        plan = indexed((
            Segment(0, prompt + first), Segment(prompt + first, prompt + first + second, 0, prompt),
        ))  # fmt: skip
        q, k, v = (
            torch.randn(1, n, prompt + first + second, D, generator=generator).bfloat16()
            for n in (HEADS, KV_HEADS, KV_HEADS)
        )
        out = layer(q, k, v, plan)
        expected = packed_attention(module, q, k, v, None, packing_plan=plan, sliding_window=5)[0]
        assert torch.equal(out, expected)
    assert counter.frame_count == 2  # for the first length, and for any length


@needs_gpu
@pytest.mark.parametrize("size", [8, 64, 128, 256])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("shared", [True, False])
def test_on_a_gpu_against_units_in_float32(size, window, shared):
    segments = (
        (Segment(0, 300), Segment(300, 450, 0, 200), Segment(450, 451, 0, 200), Segment(451, 700))
        if shared else (Segment(0, 300), Segment(300, 301), Segment(301, 700))
    )  # fmt: skip
    plan = indexed(segments).to(torch.device("cuda"))
    torch.manual_seed(0)
    halves = [torch.randn(1, n, 700, size, device="cuda").bfloat16() for n in (8, 2, 2)]
    upstream = torch.randn(1, 700, 8, size, device="cuda")

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in halves]
        assert attention_varlen.applies(*leaves) == (dtype == torch.bfloat16)
        out, _ = packed_attention(
            nn.Module(), *leaves, None, packing_plan=plan, sliding_window=window
        )
        return out, *torch.autograd.grad(out, leaves, upstream.to(dtype))

    for actual, expected in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        error = (actual.float() - expected).norm() / expected.norm()
        assert error < 0.02


@needs_gpu
def test_a_step_on_a_gpu_against_the_cpu():
    examples = [
        {
            "prompt_ids": torch.randint(VOCABULARY, (20,)).tolist(),
            "response_ids": [torch.randint(VOCABULARY, (n,)).tolist() for n in lengths],
            "response_mask": [[1] * n for n in lengths],
        }
        for lengths in ((5, 30, 7), (40,))
    ]
    batch = pack(examples, "shared").model_inputs
    model = make_model("mistral")
    install(model)
    expected = token_logprobs(model, batch)
    model.cuda().bfloat16()
    actual = token_logprobs(model, batch.to(torch.device("cuda")))
    torch.testing.assert_close(actual.cpu(), expected, rtol=0.05, atol=0.05)
