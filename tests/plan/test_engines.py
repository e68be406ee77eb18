"""How engines distribute memory: the arithmetic, and the command that starts each."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rpo_trainer.errors import RecipeError
from rpo_trainer.plan import ENGINES, StepMemory, per_device
from rpo_trainer.plan.engines import check_devices, launch_line
from tests.raising import raises

ROOT = Path(__file__).resolve().parents[2]
MEMORY = StepMemory(
    parameters=4000, gradients=4000, optimizer=8000, activations=700, reference=300,
    root=1000, layer=200,
)  # fmt: skip


def test_one_device_holds_everything() -> None:
    found = per_device(MEMORY, "single", 1, half=False)
    assert (found.weights, found.gradients, found.optimizer) == (4000, 4000, 8000)
    assert found.training == 4000 + 4000 + 8000 + 700
    assert found.reference == 4300
    assert found.peak == found.training


def test_ddp_holds_the_gradients_twice() -> None:
    assert per_device(MEMORY, "ddp", 4, half=False).training == 16700 + 4000
    assert per_device(MEMORY, "ddp", 1, half=False).training == 16700


@pytest.mark.parametrize(("half", "gathered"), [(False, 1400), (True, 700)])
def test_fsdp2_shards_all_and_gathers_two_layers_and_the_rest(half: bool, gathered: int) -> None:
    found = per_device(MEMORY, "fsdp2", 4, half=half)
    assert (found.weights, found.gradients, found.optimizer) == (1000, 1000, 2000)
    assert found.gathered == gathered
    assert found.reference == 1000 + gathered + 300


def test_zero2_keeps_the_weights_and_shards_gradients_and_state() -> None:
    found = per_device(MEMORY, "zero2", 4, half=False)
    assert (found.weights, found.gradients, found.optimizer) == (4000, 1000, 3000)
    assert found.gathered == 4000  # all gradients of such a small model are in one bucket
    assert per_device(MEMORY, "zero2", 4, half=True) == found  # its weights are float32


def test_zero3_shards_the_weights_too_and_offload_moves_them_to_the_host() -> None:
    found = per_device(MEMORY, "zero3", 4, half=True)
    assert (found.weights, found.gradients, found.optimizer, found.host) == (1000, 1000, 3000, 0)
    assert (
        found.gathered == (4000 + 4000) // 2
    )  # such a small model is not split, and is one bucket
    large = dataclasses.replace(MEMORY, parameters=4 * 10**10, gradients=4 * 10**10)
    assert per_device(large, "zero3", 4, half=False).gathered == 4 * 10**9 + 2 * 10**9
    away = per_device(MEMORY, "zero3_offload", 4, half=True)
    assert (away.weights, away.optimizer, away.host) == (0, 0, 4000)


def test_4_bit_weights_are_whole_on_every_device() -> None:
    held = dataclasses.replace(MEMORY, unsharded=2000)
    for engine in ENGINES[2:]:
        more = per_device(held, engine, 4, half=False).weights
        sharded = (4000 - 2000) // (1 if engine == "zero2" else 4)
        assert more == 2000 + (0 if engine == "zero3_offload" else sharded)


def test_more_devices_never_need_more_of_each() -> None:
    for engine in ENGINES[2:]:
        peaks = [per_device(MEMORY, engine, n, half=True).peak for n in (2, 4, 8, 64)]
        assert peaks == sorted(peaks, reverse=True)


def test_the_launch_line_names_a_config_that_ships() -> None:
    assert launch_line(["r.yaml"], "single", 1, 1) == "rpo-trainer run r.yaml"
    for engine in ENGINES[1:]:
        words = launch_line(["r.yaml"], engine, 16, 1).split()
        config = words[words.index("--config_file") + 1]
        assert YAML().load((ROOT / config).read_text())["compute_environment"] == "LOCAL_MACHINE"
        assert words[words.index("--num_processes") + 1] == "16"
    several = launch_line(["r.yaml"], "ddp", 16, 2)
    assert "multi_node.yaml" in several and "--num_machines 2" in several


def test_the_launch_line_has_what_was_planned_with() -> None:
    words = ["my recipe.yaml", "stages.dpo.beta=0.5", "--run-dir", "runs/x"]
    line = launch_line(words, "single", 1, 1)
    assert shlex.split(line) == ["rpo-trainer", "run", *words]
    assert launch_line(words, "ddp", 2, 1).endswith(line.removeprefix("rpo-trainer "))


def test_one_process_is_not_spread_over_devices() -> None:
    check_devices("single", 1, 1)
    check_devices("ddp", 8, 1)
    with raises("plan.single-process", RecipeError, where="--engine single") as error:
        check_devices("single", 8, 1)
    assert "8" in error.value.what and error.value.fix
    assert all(engine in error.value.fix for engine in ENGINES if engine != "single")
