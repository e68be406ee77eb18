"""`loss/router_aux`: the load-balancing loss of the global batch, for any split of the batch."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rpo_trainer.errors import RecipeError
from rpo_trainer.step.router_loss import router_loss_of
from rpo_trainer.trainers import RewardConfig, RewardTrainer
from tests.raising import raises
from tests.small_models import MIXTURES, make_model
from tests.trainers.plain import make_rows

COEFFICIENT, RATE, ROWS = 3.0, 0.1, 4
ASKS = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}


@pytest.fixture(scope="module")
def mixtures() -> dict[str, Any]:
    return {name: make_model(name, dtype=torch.float64, **ASKS) for name in MIXTURES}


def plain_aux(model: Any, rows: list[dict[str, Any]], top_k: int = 2) -> Tensor:
    """E · Σ f · P over all tokens of all responses, each with its prompt in a separate forward."""
    probabilities, chosen = [], []
    for row in rows:
        for response in row["response_ids"]:
            ids = torch.tensor([row["prompt_ids"] + response])
            for layer in model(input_ids=ids, output_router_logits=True).router_logits:
                p = layer.double().softmax(-1)
                probabilities.append(p)
                chosen.append(torch.zeros_like(p).scatter(1, p.topk(top_k).indices, 1.0))
    p, f = torch.cat(probabilities).mean(0), torch.cat(chosen).mean(0)
    return len(p) * (p * f).sum()


def rows_for(kind: str, seed: int = 0) -> list[dict[str, Any]]:
    ks = {"sft": (1,) * ROWS, "dpo": (2,) * ROWS, "rpo": (2, 3, 2, 4)}[kind]
    return make_rows(seed, ks, rewards=kind == "rpo")


def gradient(make_trainer: Any, kind: str, model: Any, **settings: Any) -> tuple[list[Tensor], Any]:
    """The change of each weight in one step of SGD, divided by the learning rate."""
    trainer = make_trainer(
        kind, copy.deepcopy(model), rows_for(kind), global_batch_size=ROWS, learning_rate=RATE,
        logging_strategy="steps", logging_steps=1, **settings,
    )  # fmt: skip
    trainer.train()
    pairs = zip(model.parameters(), trainer.model.parameters(), strict=True)
    return [(before - after).detach() / RATE for before, after in pairs], trainer


def assert_adds(with_it: list[Tensor], without: list[Tensor], model: Any, aux: Tensor) -> None:
    wanted = torch.autograd.grad(COEFFICIENT * aux, list(model.parameters()), allow_unused=True)
    off = norm = 0.0
    for a, b, w in zip(with_it, without, wanted, strict=True):
        w = torch.zeros_like(a) if w is None else w
        off, norm = max(off, (a - b - w).abs().max().item()), max(norm, w.abs().max().item())
    assert norm > 1e-2 and off < 1e-6 * norm, (off, norm)


DEALT = [
    {"per_device_train_batch_size": 4},
    {"per_device_train_batch_size": 1},
    {"per_device_train_batch_size": 2, "layout": "packed"},
    {"per_device_train_batch_size": 2, "layout": "padded"},
    {"per_device_train_batch_size": 4, "layout": "padded", "gradient_checkpointing": True},
    {"micro_batch_tokens": 40},
]


@pytest.mark.parametrize("kind", ["sft", "dpo", "rpo"])
@pytest.mark.parametrize("dealt", DEALT, ids=str)
def test_the_update_is_that_of_the_global_batch(
    dealt: dict[str, Any], kind: str, mixtures: Any, make_trainer: Any
) -> None:
    model = mixtures["mixtral"]
    with_it, trainer = gradient(make_trainer, kind, model, **dealt)
    without, _ = gradient(make_trainer, kind, model, router_aux_loss_coef=0.0, **dealt)
    aux = plain_aux(model, rows_for(kind))
    assert_adds(with_it, without, model, aux)
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["loss/router_aux"] == pytest.approx(aux.item(), rel=1e-9)
    terms = line["loss/sft"] if kind == "sft" else line["loss/preference"]
    assert line["loss"] == pytest.approx(terms + COEFFICIENT * aux.item(), rel=1e-6)


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_added_is_what_the_family_computes(family: str, mixtures: Any) -> None:
    model = mixtures[family]
    found = router_loss_of(model, torch.device("cpu"))
    assert (found.coefficient, found.top_k, found.experts) == (COEFFICIENT, 2, 4)
    ids = torch.arange(3, 20)[None]
    own = model(input_ids=ids, output_router_logits=True).aux_loss
    row = {"prompt_ids": ids[0, :5].tolist(), "response_ids": [ids[0, 5:].tolist()]}
    assert own.item() == pytest.approx(plain_aux(model, [row]).item(), rel=1e-5)


def test_a_step_is_the_mean_of_two_log_lines(mixtures: Any, make_trainer: Any) -> None:
    rows = make_rows(0, (2,) * 8)
    trainer = make_trainer(
        "dpo", copy.deepcopy(mixtures["mixtral"]), rows, global_batch_size=4, max_steps=2,
        learning_rate=0.0, shuffle=False, logging_strategy="steps", logging_steps=2,
    )  # fmt: skip
    trainer.train()
    found = next(line for line in trainer.state.log_history if "loss" in line)["loss/router_aux"]
    halves = [plain_aux(mixtures["mixtral"], part).item() for part in (rows[:4], rows[4:])]
    assert found == pytest.approx(sum(halves) / 2, rel=1e-9)


@pytest.mark.parametrize("size", [1, 5])
def test_an_evaluation_is_of_all_its_data(size: int, mixtures: Any, make_trainer: Any) -> None:
    model, rows = mixtures["qwen3_moe"], make_rows(1, (2,) * 5)
    trainer = make_trainer(
        "dpo", copy.deepcopy(model), rows, eval_rows=rows, per_device_eval_batch_size=size
    )
    found = trainer.evaluate()
    aux = plain_aux(model, rows).item()
    assert found["eval_loss/router_aux"] == pytest.approx(aux, rel=1e-9)
    parts = found["eval_loss/preference"] + COEFFICIENT * aux
    assert found["eval_loss"] == pytest.approx(parts, rel=1e-6)


def test_the_forwards_before_a_step_take_no_random_numbers(make_trainer: Any) -> None:
    """Dropout and noise on the embeddings are those of training without the term."""
    model = make_model("qwen3_moe", attention_dropout=0.3, **ASKS)

    def first_loss(**settings: Any) -> float:
        _, trainer = gradient(
            make_trainer, "sft", model, per_device_train_batch_size=1, neftune_noise_alpha=5.0, **settings
        )  # fmt: skip
        return next(line["loss/sft"] for line in trainer.state.log_history if "loss" in line)

    assert first_loss() == first_loss(router_aux_loss_coef=0.0)


def test_an_adapter_is_trained_by_the_term(mixtures: Any, make_trainer: Any) -> None:
    from peft import LoraConfig

    def after(**settings: Any) -> list[Tensor]:
        torch.manual_seed(0)
        trainer = make_trainer(
            "dpo", copy.deepcopy(mixtures["mixtral"]), rows_for("dpo"), global_batch_size=ROWS,
            peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=4), **settings,
        )  # fmt: skip
        trainer.train()
        return [p.detach() for p in trainer.model.parameters() if p.requires_grad]

    whole, dealt = after(per_device_train_batch_size=4), after(per_device_train_batch_size=1)
    without = after(per_device_train_batch_size=4, router_aux_loss_coef=0.0)
    assert max((a - b).abs().max().item() for a, b in zip(whole, dealt, strict=True)) < 1e-6
    assert max((a - b).abs().max().item() for a, b in zip(whole, without, strict=True)) > 1e-4


@pytest.mark.parametrize("size", [1, 4])
def test_reward_models_have_it_too(
    size: int, mixtures: Any, tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    start = AutoModelForSequenceClassification.from_config(
        mixtures["mixtral"].config, dtype=torch.float64
    )
    start.set_experts_implementation("eager")
    rows = rows_for("dpo")

    def step(coefficient: float | None) -> tuple[Any, list[Tensor]]:
        trainer = RewardTrainer(
            copy.deepcopy(start),
            args=RewardConfig(
                output_dir=str(tmp_path), max_steps=1, global_batch_size=ROWS, optim="sgd",
                per_device_train_batch_size=size, learning_rate=RATE, max_grad_norm=0.0,
                lr_scheduler_type="constant", use_cpu=True, report_to="none", disable_tqdm=True,
                save_strategy="no", router_aux_loss_coef=coefficient,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip
        before = copy.deepcopy(trainer.model)
        trainer.train()
        pairs = zip(before.parameters(), trainer.model.parameters(), strict=True)
        return before, [(a - b).detach() / RATE for a, b in pairs]

    model, with_it = step(None)
    _, without = step(0.0)
    assert_adds(with_it, without, model, plain_aux(model.base_model, rows))


SAID = [
    ("mixtral", ASKS, None, "INFO", "weight 3 (the model's config)"),
    ("mixtral", ASKS, 0.5, "INFO", "weight 0.5 (router_aux_loss_coef)"),
    ("mixtral", ASKS, 0.0, "INFO", "off, because router_aux_loss_coef is 0"),
    ("mixtral", {"router_aux_loss_coef": 0.1}, None, "INFO", "off, because the model's config"),
    ("mixtral", {"router_aux_loss_coef": 0.1}, 0.5, "INFO", "weight 0.5"),
    ("mixtral", {**ASKS, "router_aux_loss_coef": 0.0}, None, None, "router"),
    ("llama", {"aux_loss_alpha": 0.001}, None, "WARNING", "aux_loss_alpha=0.001"),
    ("llama", {}, None, None, "router"),
]


@pytest.mark.parametrize(("family", "extra", "given", "level", "text"), SAID)
def test_the_start_says_which(
    family: str, extra: Any, given: Any, level: Any, text: str, make_trainer: Any, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO, "rpo_trainer"):
        trainer = make_trainer(
            "sft", make_model(family, **extra), rows_for("sft"), router_aux_loss_coef=given
        )
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "router" in r.getMessage()]
    assert len(said) == (level is not None)
    assert level is None or (said[0][0] == level and text in said[0][1])
    assert (trainer.router is not None) == bool(said and "weight" in said[0][1])


@pytest.mark.parametrize(
    ("family", "settings", "code"),
    [
        ("llama", {}, "model.no-router-loss"),
        (
            "mixtral",
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "model.no-router-loss",
        ),
        ("mixtral", {"router_aux_loss_coef": -1.0}, "training.invalid-value"),
    ],
)  # fmt: skip
def test_a_weight_that_cannot_act_is_refused(
    family: str, settings: Any, code: str, make_trainer: Any
) -> None:
    with raises(code, RecipeError) as error:
        make_trainer(
            "sft", make_model(family), rows_for("sft"), **{"router_aux_loss_coef": 0.1, **settings}
        )
    assert "router_aux_loss_coef" in error.value.what
