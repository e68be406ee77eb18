"""Losses against closed forms in mpmath-free float64, the golden file, and gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rpo_trainer.losses import LOSSES, preference_loss, sft_loss, step_zero_losses

RTOL, ATOL = 1e-10, 1e-12
INFINITY = float("inf")


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


def pair_losses(a: float, b: float) -> dict[str, tuple[float, float]]:
    """(loss, dloss/da) of a pair from its implicit reward gap a and its target gap b, in closed form."""
    p, q = sigmoid(a), sigmoid(b)
    not_p, not_q = sigmoid(-a), sigmoid(-b)
    log_p, log_not_p, log_q, log_not_q = (-softplus(x) for x in (-a, a, -b, b))
    return {
        "dpo": (softplus(-a), -not_p),
        "rpo_bwd_kl": (q * (log_q - log_p) + not_q * (log_not_q - log_not_p), p - q),
        "rpo_fwd_kl": (
            p * (log_p - log_q) + not_p * (log_not_p - log_not_q),
            p * not_p * (a - b),
        ),
        "rpo_sq": ((a - b) ** 2, 2 * (a - b)),
        "rpo_sqloo": ((a - b) ** 2, 2 * (a - b)),
    }


def evaluate(policy, reference, rewards, *, loss_type, beta=0.1, eta=1.0, smoothing=0.0):
    """Loss and gradient with respect to the policy's log-probs, as lists."""
    logps = torch.tensor([policy], dtype=torch.float64, requires_grad=True)
    result = preference_loss(
        logps,
        torch.tensor([reference], dtype=torch.float64),
        loss_type=loss_type,
        beta=beta,
        rewards=None if rewards is None else torch.tensor([rewards], dtype=torch.float64),
        reward_scale=eta,
        label_smoothing=smoothing,
    )
    result.losses.sum().backward()
    return result.losses.item(), logps.grad[0].tolist(), result


@pytest.mark.parametrize("loss_type", ["dpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq", "rpo_sqloo"])
@pytest.mark.parametrize("a", [-30.0, -2.5, 0.0, 0.3, 4.0, 45.0])
@pytest.mark.parametrize("b", [-8.0, 0.0, 0.7, 3.0, 45.0])
def test_pairs_match_the_closed_form(loss_type, a, b):
    beta, eta = 0.1, 2.0
    loss, grad, result = evaluate(
        [-50.0 + a / beta, -60.0], [-50.0, -60.0], [b / eta, 0.0], loss_type=loss_type, eta=eta
    )
    expected, slope = pair_losses(a, b)[loss_type]
    assert loss == pytest.approx(expected, rel=RTOL, abs=ATOL)
    assert grad == pytest.approx([beta * slope, -beta * slope], rel=RTOL, abs=ATOL)
    assert result.implicit_gap.item() == pytest.approx(a, rel=RTOL, abs=ATOL)
    assert not result.implicit_rewards.requires_grad and not result.implicit_gap.requires_grad
    if loss_type != "dpo":
        assert result.target_gap.item() == pytest.approx(b, rel=RTOL)


def test_ipo_regresses_the_log_ratio_gap_on_half_over_beta():
    loss, grad, _ = evaluate([-48.0, -60.0], [-50.0, -63.0], None, loss_type="ipo", beta=0.25)
    gap = (-48.0 + 50.0) - (-60.0 + 63.0)
    assert loss == pytest.approx((gap - 2.0) ** 2, rel=RTOL)
    assert grad == pytest.approx([2 * (gap - 2.0), -2 * (gap - 2.0)], rel=RTOL)


def test_label_smoothing_is_cdpo():
    a, eps = 1.3, 0.2
    loss, grad, _ = evaluate(
        [-50.0 + a / 0.1, -60.0], [-50.0, -60.0], None, loss_type="dpo", smoothing=eps
    )
    assert loss == pytest.approx((1 - eps) * softplus(-a) + eps * softplus(a), rel=RTOL)
    assert grad[0] == pytest.approx(0.1 * (sigmoid(a) - (1 - eps)), rel=RTOL)


def softmax(values):
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


@pytest.mark.parametrize("k", [3, 4, 8])
def test_k_responses_match_the_categorical_forms(k):
    generator = torch.Generator().manual_seed(k)
    policy = (torch.randn(k, generator=generator, dtype=torch.float64) * 20 - 80).tolist()
    reference = (torch.randn(k, generator=generator, dtype=torch.float64) * 20 - 80).tolist()
    rewards = (torch.rand(k, generator=generator, dtype=torch.float64) * 5).tolist()
    beta, eta = 0.05, 1.5
    a = [beta * (x - y) for x, y in zip(policy, reference, strict=True)]
    b = [eta * r for r in rewards]
    p, q = softmax(a), softmax(b)
    bwd = sum(qi * (math.log(qi) - math.log(pi)) for pi, qi in zip(p, q, strict=True))
    fwd = sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p, q, strict=True))
    loo = 0.0
    for i in range(k):
        rest_a = sum(a[:i] + a[i + 1 :]) / (k - 1)
        rest_b = sum(b[:i] + b[i + 1 :]) / (k - 1)
        loo += ((a[i] - rest_a) - (b[i] - rest_b)) ** 2 / 2
    for loss_type, expected in (("rpo_bwd_kl", bwd), ("rpo_fwd_kl", fwd), ("rpo_sqloo", loo)):
        loss, grad, result = evaluate(
            policy, reference, rewards, loss_type=loss_type, beta=beta, eta=eta
        )
        assert loss == pytest.approx(expected, rel=RTOL)
        assert sum(grad) == pytest.approx(0.0, abs=1e-12)  # only differences matter
        assert result.implicit_gap.item() == pytest.approx(a[0] - sum(a[1:]) / (k - 1), rel=RTOL)
        assert result.target_gap.item() == pytest.approx(b[0] - sum(b[1:]) / (k - 1), rel=RTOL)
        if loss_type == "rpo_bwd_kl":
            slopes = [beta * (pi - qi) for pi, qi in zip(p, q, strict=True)]
            assert grad == pytest.approx(slopes, rel=1e-9, abs=ATOL)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("reward", [0.0, 1e4, -1e4, INFINITY, -INFINITY])
def test_finite_for_huge_gaps_and_infinite_targets(loss_type, dtype, gap, reward):
    logps = torch.tensor([[gap, 0.0]], dtype=dtype, requires_grad=True)
    result = preference_loss(
        logps,
        torch.zeros(1, 2, dtype=dtype),
        loss_type=loss_type,
        beta=1.0,
        rewards=torch.tensor([[reward, 0.0]], dtype=dtype),
    )
    result.losses.sum().backward()
    assert result.losses.isfinite().all() and (result.losses >= 0).all()
    assert logps.grad.isfinite().all()


def test_infinite_target_turns_rpo_bwd_kl_into_dpo():
    policy, reference = [-48.0, -60.0], [-50.0, -60.0]
    rpo = evaluate(policy, reference, [INFINITY, 0.0], loss_type="rpo_bwd_kl")
    dpo = evaluate(policy, reference, None, loss_type="dpo")
    assert rpo[0] == pytest.approx(dpo[0], rel=RTOL) and rpo[1] == pytest.approx(dpo[1], rel=RTOL)


def test_infinite_rewards_among_k_responses_are_finite():
    loss, grad, _ = evaluate(
        [-10.0, -20.0, -30.0], [-10.0, -20.0, -30.0], [INFINITY, 1.0, -INFINITY],
        loss_type="rpo_bwd_kl",
    )  # fmt: skip
    assert loss == pytest.approx(math.log(3.0)) and all(map(math.isfinite, grad))


def test_nan_reward_is_not_hidden():
    loss, _, _ = evaluate([-1.0, -2.0], [-1.0, -2.0], [float("nan"), 0.0], loss_type="rpo_sq")
    assert math.isnan(loss)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("k", [2, 5])
def test_step_zero_constant_is_the_loss_at_policy_equal_to_reference(loss_type, k):
    if k > 2 and LOSSES[loss_type].pairs_only:
        return
    logps = torch.randn(3, k, dtype=torch.float64) * 30 - 100
    rewards = torch.rand(3, k, dtype=torch.float64) * 4
    given = rewards if LOSSES[loss_type].needs_rewards else None
    actual = preference_loss(
        logps, logps, loss_type=loss_type, beta=0.3, rewards=given, reward_scale=1.7
    ).losses
    constant = step_zero_losses(loss_type, beta=0.3, rewards=given, reward_scale=1.7, shape=(3, k))
    torch.testing.assert_close(constant, actual, rtol=1e-10, atol=1e-12)


def test_step_zero_constants_of_the_design_for_pairs():
    b = 1.5
    rewards = torch.tensor([[b, 0.0]], dtype=torch.float64)
    q = sigmoid(b)
    entropy = -q * math.log(q) - (1 - q) * math.log(1 - q)
    expected = {
        "rpo_bwd_kl": math.log(2) - entropy,
        "rpo_fwd_kl": math.log(math.cosh(b / 2)),
        "rpo_sq": b * b,
        "dpo": math.log(2),
    }
    for loss_type, value in expected.items():
        got = step_zero_losses(loss_type, beta=0.1, rewards=rewards)
        assert got.item() == pytest.approx(value, rel=1e-12)


def test_sft_reductions():
    nll, tokens = torch.tensor([6.0, 10.0]), torch.tensor([2, 5])
    values = {}
    for reduction in ("sum", "token_mean", "sequence_mean"):
        numerators, weights = sft_loss(nll, tokens, reduction)
        values[reduction] = (numerators.sum() / weights.sum()).item()
    assert values == pytest.approx({"sum": 8.0, "token_mean": 16 / 7, "sequence_mean": 2.5})
    with pytest.raises(ValueError, match="'mean'"):
        sft_loss(nll, tokens, "mean")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "hinge"}, "'hinge'"),
        ({"policy_logps": torch.zeros(2)}, r"policy_logps.*\[2\]"),
        ({"reference_logps": torch.zeros(1, 3)}, r"reference_logps has shape \[1, 3\]"),
        ({"rewards": torch.zeros(2, 2)}, r"rewards has shape \[2, 2\]"),
        ({"loss_type": "rpo_bwd_kl"}, "rpo_bwd_kl.*rewards"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing.* ipo"),
        (
            {"policy_logps": torch.zeros(1, 3), "reference_logps": torch.zeros(1, 3)},
            "K = 3",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, message):
    call = {
        "policy_logps": torch.zeros(1, 2),
        "reference_logps": torch.zeros(1, 2),
        "loss_type": "dpo",
        "beta": 0.1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        preference_loss(call.pop("policy_logps"), call.pop("reference_logps"), **call)


@pytest.fixture(scope="session")
def golden(shared_dir: Path):
    return json.loads((shared_dir / "golden" / "rpo_golden.json").read_text())


def golden_pair_names(case):
    inputs = case["inputs"]
    for name in case["loss"]:
        smoothing, loss_type = 0.0, name
        if name == "cdpo_soft":
            loss_type, smoothing = "dpo", case["intermediate"]["cdpo_eps"]
        factor = 0.5 if name == "rpo_sq_half" else 1.0
        yield name, loss_type.removesuffix("_half"), smoothing, factor, inputs


def test_golden_pairs_and_edge_cases(golden):
    checked = 0
    for case in golden["cases"] + golden["edge_cases"]:
        for name, loss_type, smoothing, factor, x in golden_pair_names(case):
            loss, grad, _ = evaluate(
                [x["policy_chosen_logp"], x["policy_rejected_logp"]],
                [x["ref_chosen_logp"], x["ref_rejected_logp"]],
                [x["chosen_reward"], x["rejected_reward"]],
                loss_type=loss_type,
                beta=x["beta"],
                eta=x["eta"],
                smoothing=smoothing,
            )
            wanted = case["grad"][name]
            where = f"{case['id']} {name}"
            assert factor * loss == pytest.approx(case["loss"][name], rel=RTOL, abs=ATOL), where
            assert [factor * g for g in grad] == pytest.approx(
                [wanted["d_policy_chosen_logp"], wanted["d_policy_rejected_logp"]],
                rel=RTOL,
                abs=ATOL,
            ), where
            checked += 1
    assert checked >= 29 * 7


def test_golden_batch_means(golden):
    for name, means in golden["batch"].items():
        if name == "accuracy_all20":
            continue
        cases = golden["cases"]
        values = []
        for case in cases:
            for golden_name, loss_type, smoothing, factor, x in golden_pair_names(case):
                if golden_name != name:
                    continue
                values.append(
                    factor
                    * evaluate(
                        [x["policy_chosen_logp"], x["policy_rejected_logp"]],
                        [x["ref_chosen_logp"], x["ref_rejected_logp"]],
                        [x["chosen_reward"], x["rejected_reward"]],
                        loss_type=loss_type, beta=x["beta"], eta=x["eta"], smoothing=smoothing,
                    )[0]
                )  # fmt: skip
        assert sum(values) / 20 == pytest.approx(means["mean_all20"], rel=RTOL)
        assert sum(values[:4]) / 4 == pytest.approx(means["mean_first4"], rel=RTOL)


def test_golden_k_responses(golden):
    names = {
        "bwd_categorical_kl": "rpo_bwd_kl",
        "fwd_categorical_kl": "rpo_fwd_kl",
        "sqloo": "rpo_sqloo",
    }
    for case in golden["multi_response"]:
        x = case["inputs"]
        for name, loss_type in names.items():
            loss, grad, _ = evaluate(
                x["policy_logps"], x["ref_logps"], x["rewards"],
                loss_type=loss_type, beta=x["beta"], eta=x["eta"],
            )  # fmt: skip
            assert loss == pytest.approx(case["loss"][name], rel=RTOL, abs=ATOL)
            assert grad == pytest.approx(case["grad_d_policy_logps"][name], rel=RTOL, abs=ATOL)


def test_golden_token_level_with_the_sft_term(golden):
    for case in golden["token_level"]:
        x = case["inputs"]
        masks = [
            torch.tensor(x[f"{side}_mask"], dtype=torch.float64) for side in ("chosen", "rejected")
        ]

        def responses(who, x=x, masks=masks):
            tokens = [
                torch.tensor(x[f"{who}_{side}_token_logps"], dtype=torch.float64) * mask
                for side, mask in zip(("chosen", "rejected"), masks, strict=True)
            ]
            return torch.stack([t.sum() for t in tokens])[None]

        counts = torch.stack([m.sum() for m in masks])[None]
        policy, reference = responses("policy"), responses("ref")
        for setting, wanted in case["outputs"].items():
            loss_type, *flags = setting.split("|")
            averaged = flags[0].endswith("True")
            result = preference_loss(
                policy / counts if averaged else policy,
                reference / counts if averaged else reference,
                loss_type=loss_type,
                beta=x["beta"],
                rewards=torch.tensor(
                    [[x["chosen_reward"], x["rejected_reward"]]], dtype=torch.float64
                ),
                reward_scale=x["eta"],
            )
            reduction = "sequence_mean" if flags[1].endswith("True") else "sum"
            numerators, weights = sft_loss(-policy[:, 0], counts[:, 0], reduction)
            sft = (numerators.sum() / weights.sum()).item()
            preference = result.losses.item()
            total = x["preference_loss_weight"] * preference + x["sft_loss_weight"] * sft
            assert preference == pytest.approx(wanted["preference_loss"], rel=RTOL), setting
            assert sft == pytest.approx(wanted["sft_loss"], rel=RTOL), setting
            assert total == pytest.approx(wanted["total"], rel=RTOL), setting
