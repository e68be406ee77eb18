"""Two ranks under every engine are one process on the same global batch: losses, weights, references."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import require, run, torchrun
from tests.distributed.worker import ENGINES, STEPS
from tests.models import make_model

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

TOLERANCE = 1e-5
KINDS = ("sft", "dpo", "rpo")
CASES = {
    f"{kind}-{accumulation}{'-checkpointing' * checkpointing}": {
        "kind": kind, "accumulation": accumulation, "checkpointing": checkpointing,
        "tied": checkpointing ^ (accumulation == 4),
    }
    for kind, accumulation, checkpointing in itertools.product(KINDS, (1, 4), (False, True))
}  # fmt: skip
# With a token budget the number of forwards follows the lengths; some examples alone are longer.
CASES["rpo-tokens"] = {
    "kind": "rpo", "accumulation": 4, "checkpointing": False, "tied": False, "tokens": 40,
}  # fmt: skip
CASES["rpo-tokens"] = {
    "kind": "rpo", "accumulation": 4, "checkpointing": False, "tied": True,
    "settings": {"micro_batch_tokens": 90},
}  # fmt: skip
HARMS = {
    f"not-finite-{harm}": {
        "kind": "rpo", "accumulation": 1, "checkpointing": False, "tied": True, "harm": harm,
    }
    for harm in ("loss", "gradient")
}  # fmt: skip
# Metrics on the size of log-probs, tens of nats, are compared relative to it.
NOISY = ("accuracies", "falling", "runtime", "second")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    for name, tied in (("tied", True), ("untied", False)):
        make_model(tie_word_embeddings=tied).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def results(models: Path) -> Any:
    """Results of one engine, all cases in one start of its processes."""
    known: dict[str, dict[str, Any]] = {}

    def of(engine: str) -> dict[str, Any]:
        require(engine)
        if engine not in known:
            wanted = CASES if engine == "none" else CASES | HARMS
            cases = [json.dumps({"name": name, **case}) for name, case in wanted.items()]
            worker = ["tests.distributed.worker", engine, str(models / engine), *cases]
            alone = [sys.executable, "-m", *worker]
            ended = run(alone if engine == "none" else torchrun(*worker))
            assert ended.returncode == 0, ended.stdout[-5000:]
            known[engine] = {
                name: torch.load(models / engine / f"{name}.pt", weights_only=False)
                for name in wanted
            }
        return known[engine]

    return of


def difference(mine: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
    """Largest difference of losses by step, of all logged means, and of final weights."""
    assert len(mine["losses"]) == len(one["losses"]) == STEPS
    assert mine["weights"].keys() >= one["weights"].keys() - {"lm_head.weight"}
    pairs = list(
        zip(mine["losses"] + mine["evaluations"], one["losses"] + one["evaluations"], strict=True)
    )
    means = [
        abs(a[name] - b[name]) / max(1.0, abs(b[name]))
        for a, b in pairs
        for name in b
        if not any(word in name for word in NOISY)
    ]
    return {
        "loss": max(abs(a["loss"] - b["loss"]) for a, b in pairs if "loss" in b),
        "means": max(means),
        "weights": max(
            (mine["weights"][name] - weight).abs().max().item()
            for name, weight in one["weights"].items()
            if name in mine["weights"]
        ),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_are_one(engine: str, results: Any, capsys: pytest.CaptureFixture[str]) -> None:
    mine, one = results(engine), results("none")
    table = {name: difference(mine[name], one[name]) for name in CASES}
    with capsys.disabled():
        print(f"\n{engine:8}{'loss':>28}{'means':>12}{'weights':>12}")
        for name, values in table.items():
            print(f"  {name:22}" + "".join(f"{value:12.1e}" for value in values.values()))
    for name, values in table.items():
        assert mine[name]["engine"] == engine and mine[name]["world_size"] == 2
        moved = max(
            (weight - weights_of_start(CASES[name], results)[key]).abs().max()
            for key, weight in one[name]["weights"].items()
        )
        assert moved > 1e-3  # something has been trained
        assert max(values.values()) <= TOLERANCE, (name, values)


def weights_of_start(case: dict[str, Any], results: Any) -> dict[str, torch.Tensor]:
    return make_model(tie_word_embeddings=case["tied"]).state_dict()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_ranks_see_different_rows_and_all_of_them(engine: str, results: Any) -> None:
    for name in CASES:
        mine, one = results(engine)[name]["seen"], results("none")[name]["seen"]
        for step in range(STEPS):
            first, second = (sorted(mine.get((rank, step), [])) for rank in (0, 1))
            assert not set(first) & set(second), name
            assert sorted(first + second) == sorted(one[0, step]), name


@pytest.mark.parametrize("engine", ENGINES)
def test_the_reference_cache_is_that_of_one_process(engine: str, results: Any) -> None:
    for name, case in CASES.items():
        mine, one = results(engine)[name], results("none")[name]
        assert mine["references"].keys() == one["references"].keys()
        if case["kind"] == "sft":
            continue
        assert one["references"]
        for key, value in one["references"].items():
            assert mine["references"][key] == pytest.approx(value, abs=1e-4), name
        assert mine["step_zero"]["nats_per_token"] < 1e-6
        assert mine["step_zero"]["loss"] == pytest.approx(one["step_zero"]["loss"], abs=1e-6)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_finite_on_one_rank_stops_all_before_a_weight_moves(
    engine: str, harm: str, results: Any
) -> None:
    found = results(engine)[harm]
    what = harm.rsplit("-", 1)[1]
    assert found["steps"] == 1
    assert found["errors"][0] == found["errors"][1]
    assert f"the {what} is not finite at step 2" in found["errors"][0]
    assert found["errors"][0].startswith("rows row-")
    for name, weight in found["before"].items():
        assert torch.equal(found["after"][name], weight), name
