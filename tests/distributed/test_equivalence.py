"""Two ranks under every engine equal one process on the same global batch: losses, weights, references."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_trainer.trainers.manifest import shares
from tests.conftest import Injected
from tests.distributed.launch import require, run, torchrun
from tests.distributed.worker import ENGINES, STEPS
from tests.small_models import make_model

pytestmark = pytest.mark.slow

TITLE = "two ranks against one: largest differences"
KINDS = ("sft", "dpo", "rpo")
Case = dict[str, Any]
MATRIX: dict[str, Case] = {
    f"{kind} ×{accumulation}{' checkpointing' * checkpointing}": {
        "kind": kind, "accumulation": accumulation, "checkpointing": checkpointing,
        "tied": checkpointing ^ (accumulation == 4),
    }
    for kind, accumulation, checkpointing in itertools.product(KINDS, (1, 4), (False, True))
}  # fmt: skip
ATTENTION = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16}
HEAD = {**ATTENTION, "target_modules": ["q_proj", "lm_head"]}
# A mixture of experts whose config enables the loss of its routers.
ROUTERS = {"moe": True, "fsdp": {"transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"]}}
OTHERS: dict[str, Case] = {
    # With a token budget the number of forwards depends on the lengths; some examples alone exceed it.
    "rpo short forwards": {
        "kind": "rpo", "accumulation": 4, "settings": {"micro_batch_tokens": 40},
    },
    "rpo long forwards": {
        "kind": "rpo", "accumulation": 4, "tied": True, "settings": {"micro_batch_tokens": 90},
    },
    # FSDP, ZeRO-2 and ZeRO-3 have a token budget by default: see `test_the_default_budget`.
    "rpo ×4 by number": {"kind": "rpo", "accumulation": 4, "settings": {"micro_batch_tokens": 0}},
    "sft ×4 routers by number": {
        "kind": "sft", "accumulation": 4, "settings": {"micro_batch_tokens": 0}, **ROUTERS,
    },
    "dpo ×4 given": {
        "kind": "dpo", "accumulation": 4,
        "settings": {"gradient_accumulation_steps": 4, "global_batch_size": None},
    },
    "rpo other reference": {"kind": "rpo", "other_reference": True},
    "reward": {"kind": "reward", "accumulation": 4},
    "sft LoRA": {"kind": "sft", "accumulation": 4, "lora": ATTENTION},
    "rpo LoRA on the head": {"kind": "rpo", "tied": True, "checkpointing": True, "lora": HEAD},
    "dpo DoRA": {"kind": "dpo", "lora": {**ATTENTION, "use_dora": True}},
    "dpo LoRA, head saved": {"kind": "dpo", "lora": {**ATTENTION, "modules_to_save": ["lm_head"]}},
    "sft ×4 routers": {"kind": "sft", "accumulation": 4, **ROUTERS},
    "rpo ×1 routers": {"kind": "rpo", "checkpointing": True, **ROUTERS},
    "rpo short forwards, routers": {
        "kind": "rpo", "accumulation": 4, "settings": {"micro_batch_tokens": 40}, **ROUTERS,
    },
    "dpo ×4 routers LoRA": {"kind": "dpo", "accumulation": 4, "lora": ATTENTION, **ROUTERS},
    "reward routers": {"kind": "reward", "accumulation": 4, **ROUTERS},
    "rpo ×4 offload": {
        **MATRIX["rpo ×4 checkpointing"],
        "settings": {"activation_checkpointing_kwargs": {"offload": True}},
    },
}  # fmt: skip
BF16: dict[str, Case] = {
    f"{name} bfloat16": {**(MATRIX | OTHERS)[name], "settings": {"bf16": True}}
    for name in ("sft ×4", "rpo ×1", "rpo LoRA on the head")
}
# Engines must not round weights, because rounding would remove the updates.
SMALL = "sft small steps bfloat16"
BF16[SMALL] = {"kind": "sft", "settings": {"bf16": True, "learning_rate": 1e-6}}
CASES = MATRIX | OTHERS | BF16
# FSDP's own settings; without a counterpart on one rank, they are compared with the default case.
OF_FSDP: dict[str, Case] = {
    "rpo FSDP checkpointing": {
        **MATRIX["rpo ×4"], "like": "rpo ×4", "fsdp": {"activation_checkpointing": True},
    },
    "rpo loaded by one rank": {
        **MATRIX["rpo ×1"], "like": "rpo ×1", "fsdp": {"cpu_ram_efficient_loading": True},
    },
    "rpo other reference, loaded by one rank": {
        **OTHERS["rpo other reference"], "like": "rpo other reference",
        "fsdp": {"cpu_ram_efficient_loading": True},
    },
}  # fmt: skip
# ZeRO-3 tests what ZeRO-2 does, and more.
BY_ENGINE = [pytest.param(name, marks=[pytest.mark.long] * (name == "zero2")) for name in ENGINES]
HARMS = {
    f"not-finite-{harm}": {"kind": "rpo", "tied": True, "harm": harm}
    for harm in ("loss", "gradient")
}
SKIPPED = "not-finite-gradient, left out"
SKIPS: Case = {
    **HARMS["not-finite-gradient"],
    "settings": {"on_nonfinite": "skip", "max_skipped_steps": 1},
}
LATE = "checkpoint of a late rank"
SAVED: Case = {
    "kind": "sft",
    "late": True,
    "settings": {"save_strategy": "steps", "save_steps": STEPS},
}
BEST = "best at the end"
WORSE: Case = {
    "kind": "sft",
    "best": True,
    "settings": {
        "save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "learning_rate": 1.0,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    },
}  # fmt: skip
# Metrics of log-prob magnitude, tens of nats, are compared relative to it. The logged epoch counts forwards,
# or with a token budget steps, which differ in an incomplete last step.
NOISY = ("accuracies", "falling", "runtime", "second", "epoch")


def cases_of(engine: str) -> dict[str, Case]:
    """The cases that are trained and compared under an engine."""
    return CASES | (OF_FSDP if engine == "fsdp2" else {})


def alone_cases_of(engine: str) -> dict[str, Case]:
    """The cases of an engine that have no counterpart on one rank."""
    if engine == "none":
        return {}
    # DeepSpeed moves the weights within the backward pass: the step cannot be skipped.
    return (
        HARMS
        | {LATE: SAVED, BEST: WORSE}
        | ({SKIPPED: SKIPS} if engine in ("ddp", "fsdp2") else {})
    )


def limits(name: str) -> dict[str, float]:
    """Tolerances of `difference`. bfloat16 has 8 bits, FSDP casts more; weights move by 2e-2."""
    if "bfloat16" not in name:
        return dict.fromkeys(("loss", "means", "weights"), 1e-5)
    return {"loss": 5e-3, "means": 2e-2, "weights": 4e-6 if name == SMALL else 5e-3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    for name, tied in (("tied", True), ("untied", False)):
        make_model(tie_word_embeddings=tied).save_pretrained(folder / name)
    make_model(seed=1).save_pretrained(folder / "other")
    routers = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    make_model("mixtral", **routers).save_pretrained(folder / "moe")
    return folder


@pytest.fixture(scope="module")
def results(models: Path) -> Any:
    """Results of one engine, with all cases in one start of its processes."""
    known: dict[str, dict[str, Any]] = {}

    def of(engine: str) -> dict[str, Any]:
        require(engine)
        if engine not in known:
            wanted = cases_of(engine) | alone_cases_of(engine)
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


def pairs_of(engine: str, results: Any) -> list[tuple[str, Any, Any]]:
    """(case, result of two ranks under an engine, result of one rank)."""
    mine, one = results(engine), results("none")
    return [(name, mine[name], one[c.get("like", name)]) for name, c in cases_of(engine).items()]


def difference(mine: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
    """Largest difference of losses by step, of all logged means, and of final weights.

    A correlation of scores that differ by little amplifies rounding, so it counts a tenth.
    """
    assert len(mine["losses"]) == len(one["losses"]) == STEPS
    assert mine["weights"].keys() >= one["weights"].keys() - {"lm_head.weight"}
    pairs = list(
        zip(mine["losses"] + mine["evaluations"], one["losses"] + one["evaluations"], strict=True)
    )
    means = [
        abs(a[name] - b[name]) / (10.0 if "pearson" in name else max(1.0, abs(b[name])))
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


@pytest.mark.parametrize("engine", BY_ENGINE)
def test_two_ranks_are_one(engine: str, results: Any, record_property: Any) -> None:
    table = {name: difference(mine, one) for name, mine, one in pairs_of(engine, results)}
    head = f"{engine:42}" + "".join(f"{column:>10}" for column in ("loss", "means", "weights"))
    record_property(f"table: {TITLE}", head)
    for name, found in table.items():
        line = f"  {name:40}" + "".join(f"{value:10.1e}" for value in found.values())
        record_property(f"table: {TITLE}", line)
    for name, mine, one in pairs_of(engine, results):
        assert mine["engine"] == engine and mine["world_size"] == 2
        moved = max((w - one["start"][key]).abs().max() for key, w in one["weights"].items())
        assert moved > (1e-6 if name == SMALL else 1e-3)  # the weights have changed
        assert bool(mine["offloads"]) == ("offload" in name)
        for column, limit in limits(name).items():
            assert table[name][column] <= limit, (name, table[name])


@pytest.mark.parametrize("engine", ["none", *ENGINES])
def test_half_precision_is_of_the_arithmetic_alone(engine: str, results: Any) -> None:
    for name in BF16:
        found = results(engine)[name]
        assert found["optimizer_dtypes"] == {"torch.float32"}, name
        assert {w.dtype for w in found["weights"].values()} == {torch.float32}
        # PEFT saves the frozen bfloat16 weight of the head with its adapter.
        trained = [w for key, w in found["weights"].items() if "base_layer" not in key]
        rounded = [not torch.equal(w, w.bfloat16().float()) for w in trained]
        assert all(rounded), name  # steps below the resolution of bfloat16 are kept
        if name != SMALL:
            whole = results(engine)[name.removesuffix(" bfloat16")]
            assert (
                found["losses"][0]["loss"] != whole["losses"][0]["loss"]
            )  # the frozen weight was bfloat16


@pytest.mark.parametrize("engine", BY_ENGINE)
def test_the_ranks_see_different_rows_and_all_of_them(engine: str, results: Any) -> None:
    for name, mine, one in pairs_of(engine, results):
        for step in range(STEPS):
            first, second = (sorted(mine["seen"].get((rank, step), [])) for rank in (0, 1))
            assert not set(first) & set(second), name
            assert sorted(first + second) == sorted(one["seen"][0, step]), name


@pytest.mark.parametrize("engine", BY_ENGINE)
def test_the_default_budget(engine: str, results: Any) -> None:
    """For ranks that wait for each other in each micro-batch; never more forwards, and 0 turns it off."""
    found = results(engine)
    for name, wanted in (
        ("rpo ×4", engine != "ddp"), ("dpo ×4 given", engine != "ddp"), ("rpo ×4 by number", False),
    ):  # fmt: skip
        assert found[name]["by_tokens"] == wanted, name
        assert all(n <= most for n, most in zip(found[name]["forwards"], (4, 4, 1), strict=True)), (
            name
        )
    assert found["rpo ×4 by number"]["forwards"] == [4, 4, 1]


@pytest.mark.parametrize("engine", BY_ENGINE)
def test_the_reference_cache_is_that_of_one_process(engine: str, results: Any) -> None:
    for name, mine, one in pairs_of(engine, results):
        found, expected = mine["references"], one["references"]
        if engine.startswith("zero") and "LoRA" in name and "bfloat16" in name:
            # DeepSpeed keeps the rounded base in float32: the same log-probs under another content key.
            found, expected = (
                {row: logps for (_, row), logps in each.items()} for each in (found, expected)
            )
        assert found.keys() == expected.keys()
        if name.startswith(("sft", "reward")):
            continue
        assert expected
        exact = "bfloat16" not in name
        for key, value in expected.items():
            off = 1e-4 if exact else 0.02 * abs(value)
            assert found[key] == pytest.approx(value, abs=off), name
        if "other reference" in name:
            assert mine["step_zero"] is None  # the policy does not start from it
            continue
        assert mine["step_zero"]["nats_per_token"] < (1e-6 if exact else 0.02)
        off = 1e-6 if exact else 1e-3
        assert mine["step_zero"]["loss"] == pytest.approx(one["step_zero"]["loss"], abs=off), name


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("engine", BY_ENGINE)
def test_what_is_not_finite_on_one_rank_stops_all_before_a_weight_moves(
    engine: str, harm: str, results: Any, injected: Injected
) -> None:
    found = results(engine)[harm]
    what = harm.rsplit("-", 1)[1]
    assert len(found["weights"]) == 1  # one step was taken
    assert found["errors"][0] == found["errors"][1]
    assert f"the {what} is not finite at step 2" in found["errors"][0]
    assert found["errors"][0].startswith("rows row-")
    for name, weight in found["weights"][0].items():
        assert torch.equal(found["after"][name], weight), name
    injected(f"{engine}: the {what} is not finite on one rank", "stopped")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_ranks_leave_out_the_step_that_is_not_finite_on_one(engine: str, results: Any) -> None:
    found = results(engine)[SKIPPED]
    assert found["errors"] == {0: None, 1: None}
    (first,), (second,) = found["skipped"][0], found["skipped"][1]
    assert first == second and (first["step"], first["what"]) == (2, "gradient")
    before, left_out, taken = found["weights"]
    for name, weight in before.items():
        assert torch.equal(left_out[name], weight), name
        assert taken[name].isfinite().all()
    assert any(not torch.equal(taken[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("engine", BY_ENGINE)
def test_a_checkpoint_waits_for_the_last_rank(engine: str, results: Any) -> None:
    found = results(engine)[LATE]
    assert found["damage"] is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(found["sizes"])


@pytest.mark.parametrize("engine", BY_ENGINE)
def test_each_rank_hashes_its_own_share(engine: str, results: Any) -> None:
    found = results(engine)[LATE]
    assert found["hashed"] == dict(enumerate(map(sorted, shares(found["sizes"], 2))))
    assert "rng_state_1.pth" in found["hashed"][1]


@pytest.mark.parametrize("engine", BY_ENGINE)
def test_every_rank_has_the_best_weights_at_the_end(engine: str, results: Any) -> None:
    found = results(engine)[BEST]
    best = min(found["losses"], key=found["losses"].get)
    assert best < STEPS and Path(found["best"]).name == f"checkpoint-{best}"
    assert found["again"] == pytest.approx(found["losses"][best], rel=1e-6)
    assert found["again"] != pytest.approx(found["losses"][STEPS], rel=1e-3)
