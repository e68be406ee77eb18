"""FlexAttention's key ranges, block lists and results, compared with explicit scores.

On a CPU torch runs it in dense form, forward and backward, and refuses gradients in one private check that
is lifted here; that form reads masks and no lists of blocks. Those are read by the kernel that a C++ compiler
makes, which only goes forward. Kernels for GPUs are tried on a GPU alone.
"""

from __future__ import annotations

import pickle
import random
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from rpo_trainer.step import attention_flex
from rpo_trainer.step.attention import packed_attention
from rpo_trainer.step.attention_flex import FlexIndex
from rpo_trainer.step.batch import AttentionPlan, Segment
from rpo_trainer.step.forward import install, token_logprobs
from rpo_trainer.step.packing import pack
from tests.small_models import VOCABULARY, make_model
from tests.step.test_attention import HEADS, KV_HEADS, PLAN, POSITIONS, SINKS, T, sees
from tests.step.test_forward import compare, random_examples

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZE = 16  # the smallest head size that FlexAttention supports


def indexed(segments: tuple[Segment, ...] = PLAN) -> AttentionPlan:
    return AttentionPlan(segments, flex_index=FlexIndex.of(segments))


def emulate(monkeypatch: pytest.MonkeyPatch, compiled: Any = attention_flex._attend) -> list[int]:
    """Use uncompiled FlexAttention on a CPU for every dtype; return its calls (number of tokens)."""
    calls: list[int] = []

    def called(query: Tensor, *args: Any) -> Tensor:
        calls.append(query.shape[2])
        return compiled(query, *args)

    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention_flex, "_has_kernel", lambda device: True)
    monkeypatch.setattr(attention_flex, "_DTYPES", (torch.float64, torch.float32))
    monkeypatch.setattr(attention_flex, "_kernel_options", lambda *facts: {})
    monkeypatch.setattr(attention_flex, "_compiled", called)
    return calls


def make_tensors(tokens: int = T, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, n, tokens, SIZE, generator=generator, dtype=dtype)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )


def random_segments(seed: int) -> tuple[Segment, ...]:
    """Examples of one to four responses, long and short; some responses share no prompt."""
    draw = random.Random(seed)
    segments: list[Segment] = []
    end = 0
    for _ in range(draw.randint(1, 5)):
        longest = draw.choice([3, 60, 400])
        start, prompt = end, draw.randint(1, longest)
        end += prompt + draw.randint(1, longest)
        segments.append(Segment(start, end))
        for _ in range(draw.randint(0, 3)):
            first, end = end, end + draw.randint(1, longest)
            segments.append(Segment(first, end, start, start + prompt))
    return tuple(segments)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 7, 100])
def test_mask_is_who_sees_whom(window):
    index = FlexIndex.of(PLAN)
    assert index.positions.tolist() == POSITIONS
    mask = create_mask(index.block_mask(window).mask_mod, 1, 1, T, T, device="cpu")[0, 0]
    expected = [
        [sees(i, j) and (window is None or POSITIONS[i] - POSITIONS[j] < window) for j in range(T)]
        for i in range(T)
    ]
    assert mask.tolist() == expected
    assert index.block_mask(window) is index.block_mask(window)  # computed once for all layers


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [None, 1, 40, 128, 300])
def test_no_block_is_missed_and_none_goes_unmasked(seed, window):
    """Compared with torch's lists from the full mask; ours may visit and mask more blocks."""
    segments = random_segments(seed)
    ours = FlexIndex.of(segments).block_mask(window)
    tokens = segments[-1].stop
    torchs_own = create_block_mask(ours.mask_mod, 1, 1, tokens, tokens, device="cpu")

    def blocks(mask: Any, side: str) -> tuple[Tensor, Tensor]:
        """Blocks with a mask, and without one."""
        name = "kv" if side == "keys" else "q"
        found = []
        for full in ("", "full_"):
            counts = getattr(mask, f"{full}{name}_num_blocks")[0, 0]
            indices = getattr(mask, f"{full}{name}_indices")[0, 0].long()
            listed = torch.arange(indices.shape[1]) < counts[:, None]
            found.append(torch.zeros_like(listed).scatter(1, indices, listed))
        return found[0], found[1]

    for side in ("keys", "queries"):
        masked, whole = blocks(ours, side)
        needed, may_be_whole = blocks(torchs_own, side)
        assert not (masked & whole).any()
        assert not (whole & ~may_be_whole).any()
        assert not ((needed | may_be_whole) & ~(masked | whole)).any()
    if len(segments) == 1:
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(ours, name), getattr(torchs_own, name))


CASES = [
    {"softcap": 1.5},
    {"softcap": 1.5, "window": 3, "scaling": 0.2},
    {"sinks": SINKS},
    {"sinks": SINKS, "window": 2},
    {"sinks": SINKS, "softcap": 0.7, "scaling": 0.5, "window": 5},
]
_NAMES = {"window": "sliding_window", "sinks": "s_aux"}


def outputs_and_gradients(
    tensors: tuple[Tensor, ...], plan: AttentionPlan, settings: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Of queries, keys, values and, where there are any, sinks."""
    given = {_NAMES.get(name, name): value for name, value in settings.items()}
    leaves = [x.clone().requires_grad_() for x in tensors]
    if "s_aux" in given:
        given["s_aux"] = given["s_aux"].to(tensors[0]).requires_grad_()
        leaves.append(given["s_aux"])
    out, _ = packed_attention(nn.Module(), *leaves[:3], None, packing_plan=plan, **given)
    weights = torch.linspace(-1, 1, out.numel()).to(out).reshape(out.shape)
    return out, *torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_scores_written_out(settings, dtype, tolerance, monkeypatch):
    tensors = make_tensors(dtype=dtype)
    expected = outputs_and_gradients(tensors, AttentionPlan(PLAN), settings)
    calls = emulate(monkeypatch)
    actual = outputs_and_gradients(tensors, indexed(), settings)
    assert calls == [T]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def gpt_oss(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=16, num_hidden_layers=2, head_dim=SIZE,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=6, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


MODELS = {
    "gemma2": lambda dtype=torch.float64: make_model("gemma2", dtype=dtype, head_dim=SIZE),
    "gpt_oss": gpt_oss,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_model_equals_plain_forwards(name, layout, monkeypatch):
    model = MODELS[name]()
    calls = emulate(monkeypatch)
    exact = (
        next(model.parameters()).dtype == torch.float64
    )  # not supported by torch's grouped experts
    rtol, atol = (1e-9, 1e-10) if exact else (1e-4, 1e-5)
    compare(model, random_examples(0), layout, rtol=rtol, atol=atol)
    assert len(calls) == 2  # layers


@pytest.mark.parametrize("change", [{"dropout": 0.5}, {"s_aux": None}, {"index": False}])
def test_cases_without_flex_attention_use_units(change, monkeypatch):
    """Dropout; attention for which faster kernels exist; plans without an index."""
    calls = emulate(monkeypatch)
    settings = {"s_aux": SINKS, **change}
    plan = indexed() if settings.pop("index", True) else AttentionPlan(PLAN)
    packed_attention(nn.Module(), *make_tensors(), None, packing_plan=plan, **settings)
    assert not calls


@pytest.mark.parametrize(
    ("change", "applies"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float64}, False),
        ({"value_dtype": torch.float32}, False),
        ({"device": "cpu"}, False),
        ({"size": 256}, True),
        ({"size": 96}, True),
        ({"size": 16}, True),
        ({"size": 8}, False),
        ({"size": 264}, False),
        ({"value_size": 128}, True),
        ({"value_size": 8}, False),
        ({"capability": (7, 5)}, False),
        ({"hip": "6.4"}, False),
        ({"triton": False}, False),
        ({"dropout": 0.1}, False),
    ],
)
def test_where_flex_attention_applies(change: dict[str, Any], applies: bool, monkeypatch):
    got = {
        "dtype": torch.bfloat16, "device": "cuda", "size": 64, "value_size": None, "value_dtype": None,
        "capability": (8, 0), "hip": None, "triton": True, "dropout": 0.0, **change,
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: got["capability"])
    monkeypatch.setattr(torch.version, "hip", got["hip"])
    monkeypatch.setattr(attention_flex, "has_triton", lambda: got["triton"])
    with FakeTensorMode():
        query, key, value = (
            torch.empty(1, n, 9, size, device=got["device"], dtype=dtype)
            for n, size, dtype in (
                (4, got["size"], got["dtype"]),
                (2, got["size"], got["dtype"]),
                (2, got["value_size"] or got["size"], got["value_dtype"] or got["dtype"]),
            )
        )
    assert attention_flex.applies(query, key, value, dropout=got["dropout"]) == applies


@pytest.mark.parametrize("memory", [101_376, 166_912, 232_448])  # RTX 4090, A100, H100
@pytest.mark.parametrize("size", [16, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_kernels_fit_the_shared_memory(memory, size, itemsize, monkeypatch):
    class Properties:
        shared_memory_per_block_optin = memory

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    options = attention_flex._kernel_options(size, itemsize, torch.device("cuda"))
    assert options.pop("BACKEND") == "TRITON"
    assert (not options) == (size in (64, 128, 256) and memory > 160_000)
    if options:
        rounded = next(n for n in (16, 32, 64, 128, 256) if n >= size)
        blocks = {value for name, value in options.items() if name.startswith("BLOCK")}
        assert len(blocks) == 1 and options["num_stages"] == 1
        assert max(blocks) >= 16 and 4 * max(blocks) * rounded * itemsize <= 65_536


def test_an_index_moves_with_its_batch(monkeypatch):
    examples = [
        {"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]], "response_mask": [[1], [1, 1]]}
    ]
    batch = pack(examples, "shared").model_inputs
    index = batch.plan.flex_index
    assert index.tokens == 5 and index.spans.tolist() == [[0, 3, 0, 0], [3, 5, 0, 2]]
    index.block_mask(None)
    moved = batch.to(torch.device("meta")).plan.flex_index
    mask = moved.block_mask(2)
    assert {x.device.type for x in (moved.spans, moved.positions, mask.kv_indices)} == {"meta"}
    there = pickle.loads(pickle.dumps(pack(examples, "shared").model_inputs.plan))
    assert torch.equal(there.flex_index.spans, index.spans)


def shared_prompt(tokens: int) -> tuple[Segment, ...]:
    first = tokens // 2
    return Segment(0, first), Segment(first, tokens - 9, 0, first // 2), Segment(tokens - 9, tokens)


@pytest.mark.slow
def test_traced_once_without_breaks_for_all_lengths(monkeypatch):
    """Also for a second soft-cap and scale, which torch would treat as variables."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(attention_flex._attend, dynamic=True, fullgraph=True, backend=counter)
    counts = []
    for softcap, scaling in ((1.5, None), (0.7, 0.2), (0.9, 0.3)):
        for tokens in (300, 433, 650, 1000):
            tensors = make_tensors(tokens, torch.float32)
            plan = shared_prompt(tokens)
            settings = {"softcap": softcap, "scaling": scaling, "sinks": SINKS, "window": 50}
            with monkeypatch.context() as patch:
                emulate(patch, traced)
                actual = outputs_and_gradients(tensors, indexed(plan), settings)
            expected = outputs_and_gradients(tensors, AttentionPlan(plan), settings)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_a_fused_kernel_reads_the_lists_of_blocks(monkeypatch):
    compiled = attention_flex._compiled
    for tokens, window in ((700, None), (1000, None), (1000, 100), (1300, 300)):
        tensors = make_tensors(tokens, torch.float32)
        plan = shared_prompt(tokens)
        with monkeypatch.context() as patch:
            calls = emulate(patch, compiled)
            out, _ = packed_attention(
                nn.Module(), *tensors, None, packing_plan=indexed(plan), softcap=1.5,
                sliding_window=window,
            )  # fmt: skip
        assert calls == [tokens]
        expected, _ = packed_attention(
            nn.Module(), *tensors, None, packing_plan=AttentionPlan(plan), softcap=1.5,
            sliding_window=window,
        )  # fmt: skip
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "size", "dtype"),
    [
        (CASES[1], 256, torch.bfloat16),  # Gemma-2
        (CASES[3], 64, torch.bfloat16),  # GPT-OSS
        (CASES[4], 96, torch.bfloat16),  # a size that torch has no settings for
        (CASES[4], 128, torch.float32),
        (CASES[2], 16, torch.float32),
    ],
)
def test_on_a_gpu_against_scores_in_float64(settings, size, dtype):
    """Rows shorter than a block, and of several blocks; with gradients of sinks."""
    for tokens in (60, 700):
        segments = shared_prompt(tokens)
        torch.manual_seed(0)
        tensors = [torch.randn(1, n, tokens, size, device="cuda").to(dtype) for n in (4, 2, 2)]
        assert attention_flex.applies(*tensors)
        plan = indexed(segments).to(torch.device("cuda"))
        actual = outputs_and_gradients(tensors, plan, settings)
        expected = outputs_and_gradients(
            [x.double() for x in tensors], AttentionPlan(segments), settings
        )
        for a, e in zip(actual, expected, strict=True):
            assert (a.double() - e).norm() / e.norm() < (0.02 if dtype == torch.bfloat16 else 2e-3)


@needs_gpu
@pytest.mark.parametrize("settings", [{"softcap": 50.0}, {"sinks": SINKS, "window": 128}])
def test_memory_on_a_gpu_grows_with_length_not_its_square(settings):
    def peak(tokens: int) -> int:
        segments = shared_prompt(tokens)
        plan = indexed(segments).to(torch.device("cuda"))
        tensors = [torch.randn(1, n, tokens, 64, device="cuda").bfloat16() for n in (4, 2, 2)]
        outputs_and_gradients(tensors, plan, settings)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs_and_gradients(tensors, indexed(segments).to(torch.device("cuda")), settings)
        return torch.cuda.max_memory_allocated() - before

    assert peak(16384) < 5 * peak(4096)  # 16 times with explicit scores


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_a_gpu_against_the_cpu(name):
    batch = pack(random_examples(0), "shared").model_inputs
    model = MODELS[name](torch.float32)
    install(model)
    expected = token_logprobs(model, batch)
    actual = token_logprobs(model.cuda(), batch.to(torch.device("cuda")))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-2, atol=1e-2)
