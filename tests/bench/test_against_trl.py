"""DPO step by step against TRL's: same pairs, model and seed, SGD in float32.

Needs the `bench` extra: pip install -c constraints.txt -e '.[bench]'.
"""

from __future__ import annotations

import copy
import gc
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from tests.bench.settings import SETTINGS
from tests.small_models import make_model

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.slow

STEPS, BATCH = 20, 4
COMMON = {
    **SETTINGS,
    "max_steps": STEPS,
    "learning_rate": 0.05,
    "optim": "sgd",
    "beta": 0.2,
}


def pairs() -> list[dict[str, str]]:
    """Pairs of random lengths."""
    rng = Random(0)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice("abcdefgh +-=") for _ in range(rng.randint(low, high))).strip()

    return [
        {"prompt": f"q{text(1, 20)}:", "chosen": f"x{text(1, 25)}", "rejected": f"y{text(1, 25)}"}
        for _ in range(STEPS * BATCH)
    ]


def lines(trainer: Any) -> list[dict[str, float]]:
    found = [line for line in trainer.state.log_history if "loss" in line]
    assert len(found) == trainer.args.max_steps
    return found


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({}, {}),
    # TRL's ipo loss averages over tokens, and its sft loss covers all tokens of the batch.
    "ipo": ({"loss_type": "ipo", "average_logps": True}, {"loss_type": ["ipo"]}),
    "dpo + sft": (
        {"sft_loss_weight": 0.3, "sft_reduction": "token_mean"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_margins_agree(case: str, tmp_path: Path, capsys: Any) -> None:
    import datasets

    torch.set_num_threads(1)
    gc.freeze()  # each train() collects garbage, which would scan all imported libraries
    settings, theirs_settings = CASES[case]
    start, tokenizer, rows = make_model(vocab_size=100), character_tokenizer(), pairs()
    ours = DPOTrainer(
        copy.deepcopy(start),
        args=DPOConfig(
            output_dir=str(tmp_path / "ours"), shuffle=False, global_batch_size=BATCH,
            per_device_train_batch_size=2, **COMMON, **settings,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    theirs = trl.DPOTrainer(
        copy.deepcopy(start),
        ref_model=copy.deepcopy(start),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=False,
            **COMMON, **theirs_settings,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    for row, other in zip(ours.train_dataset.view.dataset, theirs.train_dataset, strict=True):
        assert (
            row["prompt_ids"] + row["response_ids"][0] == other["prompt_ids"] + other["chosen_ids"]
        )
        assert (
            row["prompt_ids"] + row["response_ids"][1]
            == other["prompt_ids"] + other["rejected_ids"]
        )
    ours.train()
    theirs.train()

    names = ["loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"]
    names += ["logps/chosen", "logps/rejected", "grad_norm", "learning_rate"]
    if case == "ipo":  # TRL logs rewards from sums, although its loss uses averages
        names = ["loss", "logps/chosen", "logps/rejected", "grad_norm"]
    worst = dict.fromkeys(names, 0.0)
    for own, other in zip(lines(ours), lines(theirs), strict=True):
        for name in names:
            if name == "rewards/accuracies" and abs(own["rewards/margins"]) < 1e-4:
                continue  # the policy still equals the reference: the signs of its gaps are rounding
            worst[name] = max(worst[name], abs(own[name] - other[name]))
    with capsys.disabled():
        print(f"\n{case}: largest differences {worst}")
    assert worst["loss"] < 1e-4 and worst.get("rewards/margins", 0.0) < 1e-4
    assert worst.get("rewards/accuracies", 0.0) < 1e-6 and worst["grad_norm"] < 1e-3
    assert worst["logps/chosen"] < 1e-3 and worst["logps/rejected"] < 1e-3
    moved = [line["rewards/margins"] for line in lines(ours)]
    assert max(moved) - min(moved) > 0.01  # the model has changed: zeros would agree too
    weights = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in weights) < 1e-4
    assert all(map(math.isfinite, moved))


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "global_batch_size": 4},
        {"micro_batch_tokens": 60, "global_batch_size": 4},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_in_the_order_of_the_data(settings: dict[str, Any], tmp_path: Path) -> None:
    """12 steps on rows of random lengths, in the given order, for one and a half epochs."""
    import datasets

    torch.set_num_threads(1)
    start, tokenizer, rows = make_model(vocab_size=100), character_tokenizer(), pairs()[:32]
    common = {**COMMON, "max_steps": 12}
    ours = DPOTrainer(
        copy.deepcopy(start),
        args=DPOConfig(output_dir=str(tmp_path / "ours"), shuffle=False, **common, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    theirs = trl.DPOTrainer(
        copy.deepcopy(start),
        ref_model=copy.deepcopy(start),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=2,
            gradient_accumulation_steps=2, train_sampling_strategy="sequential", bf16=False,
            **common,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    ours.train()
    theirs.train()
    losses = [[line["loss"] for line in lines(trainer)] for trainer in (ours, theirs)]
    assert len(losses[0]) == 12 and max(losses[0]) - min(losses[0]) > 1e-3
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    weights = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in weights) < 1e-4


def routed(kind: str, ours: bool, **settings: Any) -> Any:
    """A mixture of experts trained by our trainer or TRL's."""
    import datasets

    rows = pairs()
    if kind == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    common = {name: value for name, value in COMMON.items() if name != "beta" or kind == "dpo"}
    start = make_model("mixtral", vocab_size=100, router_aux_loss_coef=0.7)
    start.config.output_router_logits = "router_aux_loss_coef" not in settings
    if ours:
        config, trainer = (SFTConfig, SFTTrainer) if kind == "sft" else (DPOConfig, DPOTrainer)
        reference = {}
        more: dict[str, Any] = {"shuffle": False, "global_batch_size": BATCH, **settings}
    else:
        config, trainer = (
            getattr(trl, f"{kind.upper()}Config"),
            getattr(trl, f"{kind.upper()}Trainer"),
        )
        more = {
            "per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False, "bf16": False, **settings,
        }  # fmt: skip
        reference = {"ref_model": copy.deepcopy(start)} if kind == "dpo" else {}
        rows = datasets.Dataset.from_list(rows)
    made = trainer(
        start,
        args=config(**common, **more),
        train_dataset=rows,
        processing_class=character_tokenizer(),
        **reference,
    )
    made.train()
    return made


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("by", ["the model's config", "the field"])
def test_the_load_balancing_loss_agrees(kind: str, by: str, tmp_path: Path, capsys: Any) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    weight = {} if by != "the field" else {"router_aux_loss_coef": 0.4}
    theirs = routed(kind, False, output_dir=str(tmp_path / "theirs"), **weight)
    for size in (
        4,
        1,
    ):  # TRL's trainer accumulates the losses of micro-batches: equal only for one micro-batch
        ours = routed(
            kind, True, output_dir=str(tmp_path / str(size)), per_device_train_batch_size=size, **weight
        )  # fmt: skip
        both = list(zip(lines(ours), lines(theirs), strict=True))
        worst = {
            "loss": max(abs(a["loss"] - b["loss"]) for a, b in both),
            "aux": max(abs(a["loss/router_aux"] - b["aux_loss"]) for a, b in both),
            "grad_norm": max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in both),
        }
        weights = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
        worst["weights"] = max((a - b).abs().max().item() for a, b in weights)
        with capsys.disabled():
            print(f"\n{kind}, {by}, micro-batches of {size}: largest differences {worst}")
        assert worst["loss"] < 1e-4 and worst["aux"] < 1e-4
        assert worst["grad_norm"] < 1e-3 and worst["weights"] < 1e-4
