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

from rpo_trainer.quickstart import character_tokenizer
from rpo_trainer.trainers import DPOConfig, DPOTrainer
from tests.models import make_model

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.slow

STEPS, BATCH = 20, 4
COMMON = {
    "max_steps": STEPS,
    "learning_rate": 0.05,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "optim": "sgd",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 7,
    "max_length": None,
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
    # TRL's ipo is of averages over tokens, and its sft loss is over all tokens of the batch.
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
    gc.freeze()  # each train() collects garbage, and would go through all imported libraries
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
    for row, other in zip(ours.train_dataset.rows, theirs.train_dataset, strict=True):
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
    if case == "ipo":  # what TRL shows as its rewards are of the sums, not of what the loss is of
        names = ["loss", "logps/chosen", "logps/rejected", "grad_norm"]
    worst = dict.fromkeys(names, 0.0)
    for own, other in zip(lines(ours), lines(theirs), strict=True):
        for name in names:
            if name == "rewards/accuracies" and abs(own["rewards/margins"]) < 1e-4:
                continue  # the policy still is the reference: the signs of its gaps are rounding
            worst[name] = max(worst[name], abs(own[name] - other[name]))
    with capsys.disabled():
        print(f"\n{case}: largest differences {worst}")
    assert worst["loss"] < 1e-4 and worst.get("rewards/margins", 0.0) < 1e-4
    assert worst.get("rewards/accuracies", 0.0) < 1e-6 and worst["grad_norm"] < 1e-3
    assert worst["logps/chosen"] < 1e-3 and worst["logps/rejected"] < 1e-3
    moved = [line["rewards/margins"] for line in lines(ours)]
    assert max(moved) - min(moved) > 0.01  # it has learnt something: zeros agree too
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
    """12 steps of rows of random lengths, in the order in which they are given, in an epoch and a half."""
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
