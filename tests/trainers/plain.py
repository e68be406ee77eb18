"""Reference training: one full-logits forward per response, formulas as in the papers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rpo_trainer.step.order import StepBatchSampler
from tests.small_models import VOCABULARY


def make_rows(
    seed: int, ks: Sequence[int], *, spans: bool = False, rewards: bool = False
) -> list[dict[str, Any]]:
    """Tokenized rows of various lengths; with `spans` the masks have gaps, as in multi-turn SFT."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    rows = []
    for number, k in enumerate(ks):
        responses = [tokens(2, 12) for _ in range(k)]
        row: dict[str, Any] = {
            "id": f"row-{number}",
            "prompt_ids": tokens(1, 10),
            "response_ids": responses,
            "response_mask": [
                [int(not spans or j % 3 != 1) for j in range(len(r))] for r in responses
            ],
        }
        if rewards:
            row["rewards"] = (3 * torch.randn(k, generator=generator)).round(decimals=3).tolist()
            row["rewards"].sort(reverse=True)
        rows.append(row)
    return rows


def as_lists(value: Any) -> Any:
    """An example with lists in place of arrays."""
    if isinstance(value, dict):
        return {name: as_lists(part) for name, part in value.items()}
    if isinstance(value, list):
        return [as_lists(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


PAIRS = (2,) * 8


def rows_of(kind: str, ks: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a preference trainer: with rewards for `rpo`."""
    return make_rows(seed, ks, rewards=kind == "rpo")


def plain_sums(model: torch.nn.Module, row: dict[str, Any]) -> Tensor:
    """`[K]`, Σ log π over the trained tokens of each response, each in a separate forward."""
    sums = []
    for response, mask in zip(row["response_ids"], row["response_mask"], strict=True):
        ids = torch.tensor([row["prompt_ids"] + response])
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
        first = len(row["prompt_ids"])
        places = [j for j, trained in enumerate(mask) if trained]
        sums.append(sum(logps[first + j - 1, response[j]] for j in places))
    return torch.stack(sums)


def plain_reference(model: torch.nn.Module, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """`[K]` by row id, rounded as on disk."""
    with torch.no_grad():
        return {row["id"]: plain_sums(model, row).float().double() for row in rows}


def trained(row: dict[str, Any]) -> Tensor:
    """`[K]`, trained tokens of each response."""
    return torch.tensor([float(sum(mask)) for mask in row["response_mask"]])


def plain_preference(
    loss_type: str,
    policy: Tensor,
    reference: Tensor,
    rewards: Tensor | None,
    *,
    beta: float,
    reward_scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return one example's loss from its `[K]` log-probs, by the papers' formulas."""
    ratio = policy - reference
    if loss_type == "dpo":
        gap = beta * (ratio[0] - ratio[1])
        return (
            -(1 - label_smoothing) * gap.sigmoid().log()
            - label_smoothing * (1 - gap.sigmoid()).log()
        )
    if loss_type == "ipo":
        return (ratio[0] - ratio[1] - 1 / (2 * beta)) ** 2
    target = reward_scale * rewards
    p, q = target.softmax(0), (beta * ratio).softmax(0)
    if loss_type == "rpo_bwd_kl":
        return (p * (p / q).log()).sum()
    if loss_type == "rpo_fwd_kl":
        return (q * (q / p).log()).sum()
    if loss_type == "rpo_sq":
        return (beta * (ratio[0] - ratio[1]) - (target[0] - target[1])) ** 2
    assert loss_type == "rpo_sqloo"
    total = torch.zeros((), dtype=policy.dtype)
    for k in range(len(policy)):
        rest = [j for j in range(len(policy)) if j != k]
        implicit = beta * (ratio[k] - ratio[rest].mean())
        total = total + 0.5 * (implicit - (target[k] - target[rest].mean())) ** 2
    return total


class Objective:
    """Return the loss of one global batch."""

    def __init__(self, kind: str, reference: dict[str, Tensor] | None = None, **settings: Any):
        self.kind = kind
        self.reference = reference
        self.weight = settings.pop("sft_loss_weight", 0.0)
        self.reduction = settings.pop("sft_reduction", "sum")
        self.average = settings.pop("average_logps", False)
        self.settings = settings

    def terms(self, model: torch.nn.Module, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Preference loss and −log π of the first response."""
        sums = plain_sums(model, row)
        policy, reference = sums, self.reference[row["id"]].to(sums)
        if self.average:
            policy, reference = policy / trained(row), reference / trained(row)
        rewards = torch.tensor(row["rewards"]).to(sums) if row.get("rewards") else None
        loss = plain_preference(self.kind, policy, reference, rewards, **self.settings)
        return loss, -sums[0]

    def __call__(self, model: torch.nn.Module, batch: Sequence[dict[str, Any]]) -> Tensor:
        tokens = [trained(row)[0] for row in batch]
        if self.kind == "sft":
            return sum(-plain_sums(model, row)[0] for row in batch) / sum(tokens)
        preference, sft = [], []
        for row in batch:
            loss, nll = self.terms(model, row)
            preference.append(loss)
            sft.append(nll)
        n = len(batch)
        term = {
            "sum": lambda: sum(sft) / n,
            "token_mean": lambda: sum(sft) / sum(tokens),
            "sequence_mean": lambda: sum(a / b for a, b in zip(sft, tokens, strict=True)) / n,
        }[self.reduction]()
        return sum(preference) / n + self.weight * term


def plain_train(
    model: torch.nn.Module,
    objective: Objective,
    batches: Sequence[Sequence[dict[str, Any]]],
    *,
    lr: float,
    optimizer: str = "sgd",
) -> torch.nn.Module:
    """Return a copy of the model after one update per batch."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    adam = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for batch in batches:
        adam.zero_grad()
        objective(model, batch).backward()
        if optimizer == "adamw":
            adam.step()
            continue
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p -= lr * p.grad
    return model


def global_batches(
    rows: Sequence[dict[str, Any]],
    size: int,
    *,
    epoch: int = 0,
    shuffle: bool = True,
    seed: int = 42,
) -> list[list[dict[str, Any]]]:
    """The rows of each optimizer step; the data order is tested in tests/step/test_order.py."""
    costs = [len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in rows]
    sampler = StepBatchSampler(
        costs,
        global_batch_size=size,
        micro_batch_size=1,
        seed=seed,
        order="random" if shuffle else "data",
    )
    sampler.set_epoch(epoch)
    return [[rows[i] for i in batch] for batch in sampler.global_batches()]


def assert_same_update(
    start: torch.nn.Module, actual: torch.nn.Module, expected: torch.nn.Module, tolerance: float
) -> None:
    """Assert that the updates of every parameter agree, relative to their size."""
    wanted = dict(expected.named_parameters())
    moved = dict(actual.named_parameters())
    scale = max((wanted[n] - p).norm() for n, p in start.named_parameters())
    assert scale > 0, "nothing has moved"
    for name, p in start.named_parameters():
        off = (moved[name] - wanted[name]).norm()
        size = torch.maximum((wanted[name] - p).norm(), 1e-3 * scale)
        assert off <= tolerance * size, f"{name}: the update is off by {off / size:.1e}"


def assert_bitwise_equal(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Assert that all weights are bitwise equal."""
    other = expected.state_dict()
    for name, tensor in actual.state_dict().items():
        assert torch.equal(tensor, other[name]), name
