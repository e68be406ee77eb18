"""Sampling and planned memory: each script in its smallest setting, and a model with given lengths."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.test_scripts import ROOT, run

SIZE = ["--size", "tiny", "--vocabulary", "500"]
SAMPLE = [*SIZE, "--prompts", "4", "--batch", "8", "--max-new-tokens", "24", "--mean", "6"]
PLANNED = [*SIZE, "--prompt", "16", "--response", "8", "--steps", "2"]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("common", "lengths", "sample", "record"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_sampling_against_transformers(tmp_path: Path) -> None:
    options = ["--k", "2", "3", "--prompt", "8", "--rounds", "1"]
    printed, line = run("sample.py", *SAMPLE, *options, folder=tmp_path)
    assert [case["k"] for case in line["cases"]] == [2, 3]
    for case in line["cases"]:
        # Continuous batching runs or reports why not; `generate` always runs.
        assert {*case["rates"], *case["skipped"]} == {"ours", "generate", "generate_batch"}
        assert {*case["ratios"]} == {*case["rates"]} - {"ours"}
        assert all(0 < mean <= 24 for mean in case["mean_length"].values())
    assert "tokens/s" in printed and line["memory_speed"] is None


@pytest.mark.slow
def test_ours_alone_at_real_lengths(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("prompt,chosen,rejected\n9,5,5\n20,5,5\n")
    options = ["--lengths", str(lengths), "--rounds", "1", "--peers"]
    _, line = run("sample.py", *SAMPLE, *options, folder=tmp_path)
    (case,) = line["cases"]
    assert case["mean_length"] == {"ours": 5.0} and case["ratios"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--lora", "2", "--dtype", "bfloat16"],
        ["--lora", "2", "--dtype", "bfloat16", "--frozen", "float32"],
    ],
    ids=["full", "lora", "frozen float32"],
)
def test_planned_parts_are_the_measured_ones(options: list[str], tmp_path: Path) -> None:
    """On a CPU the peak of such a small model is noise; weights, gradients and optimizer state are not."""
    if options and importlib.util.find_spec("peft") is None:
        pytest.skip("needs PEFT")
    printed, line = run("planned.py", *PLANNED, *options, folder=tmp_path)
    assert "measured / planned" in printed and len(line["losses"]) == 2
    for part in ("weights", "gradients", "optimizer"):
        assert line["measured"][part] == pytest.approx(line["planned"][part], rel=0.01, abs=2048)
    assert 0 < line["planned"]["peak"] < line["measured"]["peak"]


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize(("dtype", "tied"), [("float32", False), ("bfloat16", True)])
def test_responses_have_the_lengths_that_the_model_was_given(
    dtype: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lengths do not depend on the sampler: here plain logits, token by token."""
    import common
    import lengths

    shape = dataclasses.replace(common.SIZES["tiny"], tied=tied)
    monkeypatch.setitem(common.SIZES, "tiny", shape)
    shares = [0.1, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.6]
    model: Any = common.make_model("tiny", 500, dtype=dtype).to("cpu")
    lengths.give_lengths(model, shares)
    generator = torch.Generator().manual_seed(0)
    words = lengths.prompt_words(500)
    ids = torch.randint(words.start, words.stop, (400, 5), generator=generator)
    with torch.no_grad():
        for _ in shares:
            chances = model(ids).logits[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    ended = ids[:, 5:] == lengths.END
    assert ended.any(1).all()
    found = (ended.int().argmax(1) + 1).tolist()
    assert {*found} == {1, 3, 8}
    for length, share in enumerate(shares, 1):
        assert found.count(length) / len(found) == pytest.approx(share, abs=0.08)


@pytest.mark.usefixtures("benchmarks")
def test_lengths_are_cut_and_too_many_are_refused() -> None:
    import common
    import lengths

    geometric = lengths.geometric(4.0, 50)
    assert sum(geometric) == pytest.approx(1.0)
    assert statistics.fmean(range(1, 51), geometric) == pytest.approx(4.0, rel=1e-3)
    assert lengths.empirical([1, 3, 9, 9], 4) == [0.25, 0.0, 0.25, 0.5]
    model = common.make_model("tiny", 40, dtype="float32")
    with pytest.raises(ValueError, match="vocabulary"):
        lengths.give_lengths(model, geometric)
