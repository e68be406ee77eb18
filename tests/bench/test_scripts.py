"""Each benchmark runs in its smallest setting, prints its documented output and writes its record."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = ["--size", "tiny", "--vocabulary", "500", "--rounds", "1"]
ROWS = ["--batch", "2", "--micro", "1", "--steps", "2", "--prompt", "16", "--response", "8"]

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")


def run(script: str, *options: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the output of a script, and the one line that it appends."""
    file = folder / "out.jsonl"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options, "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(text) for text in file.read_text().splitlines()]
    assert line["script"] == script and str(file) not in line["command"]
    assert line["versions"]["torch"] and line["device"] and line["date"]
    return done.stdout, line


@pytest.mark.parametrize("script", ["step.py", "sft.py"])
def test_ours_alone(script: str, tmp_path: Path) -> None:
    printed, line = run(script, *MODEL, *ROWS, "--peers", folder=tmp_path)
    assert "ours" in printed and "model FLOPs utilization" in printed
    assert line["ratios"] == {} and line["seconds"]["ours"] > 0 and 0 < line["utilization"] < 1


def test_balance(tmp_path: Path) -> None:
    options = ["--ranks", "4", "--micro", "1", "2", "--batch", "16", "--steps", "3"]
    printed, line = run("balance.py", *options, folder=tmp_path)
    assert "once per step" in printed and [one["micro"] for one in line["idle"]] == [1, 2]
    for one in line["idle"]:
        assert 0 <= one["bound"] <= one["once per step"] < 1
        assert one["bound"] <= one["each micro-batch"] < 1


@needs_trl
@pytest.mark.parametrize(
    ("script", "peers"), [("step.py", {"trl"}), ("sft.py", {"trl-packed", "trl-padded"})]
)
def test_against_trl(script: str, peers: set[str], tmp_path: Path) -> None:
    """With gradient accumulation on both sides; equal losses show equal work."""
    printed, line = run(script, *MODEL, *ROWS, folder=tmp_path)
    assert "ratio" in printed and set(line["ratios"]) == peers
    losses = list(line["losses"].values())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch_compile on a CPU needs g++")
def test_compiled_against_not_compiled(tmp_path: Path) -> None:
    _, line = run("step.py", *MODEL, *ROWS, "--peers", "ours-compiled", folder=tmp_path)
    losses = line["losses"]
    assert set(line["ratios"]) == {"ours-compiled"}
    assert losses["ours-compiled"] == pytest.approx(losses["ours"], rel=1e-4)


@pytest.mark.parametrize(
    ("size", "count"),
    [("smollm2", 134_515_008), ("1b", 1_235_814_400), ("8b", 8_030_261_248), ("42m", None)],
)
def test_sizes_are_those_of_the_models(
    size: str, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number of weights, and FLOPs per token from the weights that multiply it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    monkeypatch.setattr(common, "DEVICE", "meta")
    vocabulary = common.parser("test").parse_args(["--size", size]).vocabulary
    model = common.make_model(size, vocabulary, dtype="bfloat16")
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert count in (None, sum(p.numel() for p in model.parameters()))
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    rows = [common.Row(prompt=[2] * 5, responses=[[2] * 2, [2] * 1])]
    wanted = 6 * (8 * layers + 3 * model.lm_head.weight.numel())
    assert common.step_flops(rows, size, vocabulary) == wanted


@needs_trl
def test_lengths_of_real_rows_and_more_than_two_responses(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("prompt,chosen,rejected\n9,5,4\n20,6,3\n7,2000,2\n")
    options = [
        *ROWS,
        "--k",
        "4",
        "--lengths",
        str(lengths),
        "--peers",
        "trl",
        "trl-plain",
        "trl-default",
    ]
    _, line = run("step.py", *MODEL, *options, folder=tmp_path)
    assert set(line["ratios"]) == {"trl", "trl-plain", "trl-default"}


@needs_trl
def test_memory(tmp_path: Path) -> None:
    printed, line = run("step.py", *MODEL, *ROWS, "--memory", folder=tmp_path)
    assert "peak" in printed and "ratio" in printed
    ours, peer = line["memory"]["ours"], line["memory"]["trl"]
    assert ours["optimizer"] == peer["optimizer"] == 2 * ours["weights"]
    assert ours["peak"] > ours["used"] >= ours["rest"]


def test_ablation(tmp_path: Path) -> None:
    printed, line = run("ablation.py", *MODEL, "--batch", "4", "--micro", "2", folder=tmp_path)
    names = [entry["name"] for entry in line["ablation"]]
    assert names == [
        "plain", "response-only head", "packed", "shared", "cached reference", "balanced",
    ]  # fmt: skip
    assert all(f"| {name} |" in printed for name in names)


@pytest.mark.parametrize("over", ["length", "k", "vocabulary", "tile"])
def test_scaling(over: str, tmp_path: Path) -> None:
    options = ["--over", over, "--points", "2", "--tile-mib", "1"]
    printed, line = run("scaling.py", *MODEL, *ROWS, *options, folder=tmp_path)
    assert line["over"] == over and printed.count("|") > 10
    if over == "tile":
        assert [entry["vocabulary"] for entry in line["memory"]] == [32_000, 128_000]
        assert all(entry["peak"] > 0 for entry in line["memory"])
    else:
        assert len(line["sizes"]) == 2 and all(map(len, line["points"].values()))


def test_exponents_are_slopes_in_log_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    assert scaling.exponent([1, 10, 100], [3, 300, 30000]) == pytest.approx(2.0)


def test_head(tmp_path: Path) -> None:
    sizes = ["--tokens", "64", "--hidden", "16", "--vocabulary", "500", "--rounds", "1"]
    printed, line = run("head.py", *sizes, folder=tmp_path)
    assert "dense" in printed and line["errors"]["ours"] < 1e-4


def test_lengths_are_spread_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a" * 40, "chosen": "b" * 4 * n, "rejected": "c" * 12} for n in range(100)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = common.lengths_of(pairs, 4, 3)
    assert all(prompt == 10 for prompt, _ in found)
    assert sorted(lengths for _, lengths in found) == [[n, 3, n] for n in (14, 38, 63, 87)]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_gpu_script_in_its_smallest_setting(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            **{"SIZE": "tiny", "OUT": str(tmp_path), "PYTHON": sys.executable},
            **{"OMP_NUM_THREADS": "1", "ONLY": "uf head tile"},
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing was skipped." in done.stdout
    (lines,) = tmp_path.glob("*-tiny.jsonl")
    scripts = [json.loads(line)["script"] for line in lines.read_text().splitlines()]
    assert scripts == ["step.py", "scaling.py", "head.py"]
    (report,) = tmp_path.glob("*-tiny.md")
    assert "## uf" in report.read_text() and "in total." in report.read_text()
