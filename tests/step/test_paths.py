"""Every path through the step equals plain forwards: packed, shared, padded, by units and by kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rpo_trainer.step import batch
from rpo_trainer.step.packing import pack
from tests.small_models import VOCABULARY, make_model
from tests.step.test_forward import compare
from tests.varlen_kernel import emulate

PATHS = {
    "shared": ("shared", False),
    "packed": ("packed", False),
    "padded": ("padded", False),
    "shared by the kernel": ("shared", True),
    "packed by the kernel": ("packed", True),
}

# Prompt, responses: K from 1 to 8 in one micro-batch, lengths from one token to some hundreds.
LENGTHS = (
    (1, (1,)),
    (5, (3, 1)),
    (150, (100, 2, 31)),
    (40, (7, 30, 1, 12)),
    (250, (1, 23, 5, 2, 110)),
    (2, (2, 9, 4, 1, 6, 3)),
    (17, (400, 8, 1, 20, 5, 2, 11)),
    (11, (4, 1, 2, 16, 7, 3, 5, 9)),
)


def examples(seed: int, *, holes: bool = False) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(LENGTHS), generator=generator).tolist()

    def tokens(n: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    return [
        {
            "prompt_ids": tokens(LENGTHS[i][0]),
            "response_ids": [tokens(n) for n in LENGTHS[i][1]],
            # The last token is always trained, so that each response has a trained token.
            "response_mask": [
                [int(not holes or j == n - 1 or j % 3 != 1) for j in range(n)]
                for n in LENGTHS[i][1]
            ],
        }
        for i in order
    ]


def test_the_lengths_call_for_every_kind_of_unit():
    plan = pack(examples(0), "shared").model_inputs.plan
    several = [unit for unit in plan.units if len(unit) > 1]
    single = [unit[0] for unit in plan.units if len(unit) == 1]
    assert several and max(len(unit) for unit in several) > 8
    assert any(s.prefix_stop > s.prefix_start for s in single)
    assert any(s.prefix_stop == s.prefix_start for s in single)
    assert {len(example["response_ids"]) for example in examples(0)} == set(range(1, 9))


FAMILIES = {
    "llama": ("llama", {}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "as many key heads": ("qwen2", {"num_key_value_heads": 4}),
    "window of 2": ("mistral", {"sliding_window": 2}),
    "window of 50": ("mistral", {"sliding_window": 50}),
    "some layers with a window": ("gemma3_text", {}),
    "soft-capped scores": ("gemma2", {"sliding_window": 33}),
}
FAST = {
    *(("window of 50", path) for path in PATHS),
    ("one key head", "shared"),
    ("one key head", "shared by the kernel"),
    ("soft-capped scores", "shared"),
    ("soft-capped scores", "shared by the kernel"),
}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(name, path, marks=[] if (name, path) in FAST else pytest.mark.slow)
        for name in FAMILIES
        for path in PATHS
    ],
)
def test_log_probs_and_gradients(name, path, monkeypatch):
    family, settings = FAMILIES[name]
    layout, by_kernel = PATHS[path]
    calls = emulate(monkeypatch) if by_kernel else []
    model = make_model(family, dtype=torch.float64, max_position_embeddings=512, **settings)
    compare(model, examples(1), layout, rtol=1e-7, atol=1e-7)
    # Gemma-2's scores are soft-capped, which the kernel does not support.
    assert len(calls) == (2 if by_kernel and family != "gemma2" else 0)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.startswith("shared") else pytest.mark.slow)
        for path in PATHS
    ],
)
def test_masks_with_holes_in_another_order(path, monkeypatch):
    layout, by_kernel = PATHS[path]
    if by_kernel:
        emulate(monkeypatch)
    model = make_model("llama", dtype=torch.float64, max_position_embeddings=512)
    compare(model, examples(2, holes=True), layout, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dense", [0, 64, pytest.param(10**6, marks=pytest.mark.slow)])
def test_however_the_row_is_cut_into_units(dense, monkeypatch):
    monkeypatch.setattr(batch, "_DENSE_TOKENS", dense)
    model = make_model(
        "mistral", dtype=torch.float64, max_position_embeddings=512, sliding_window=20
    )
    compare(model, examples(3), "shared", rtol=1e-7, atol=1e-7)
