"""Compares the results of the trainers for one family of models with plain forwards.

The reference is a copy of the model in float64 with eager attention and experts, called with one response
at a time; if that copy computes another function (`truth`: float32), it is the model's own forward. Compared
are the log-probs and the gradient of one DPO step, of an adapter on `all-linear`, and of a reward model; a
saved model is loaded again.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.models import adapters
from rpo_trainer.models.reward_model import as_reward_model
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.step.forward import uninstall
from rpo_trainer.trainers import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from rpo_trainer.trainers.examples import Examples
from tests.families import NOT_SWEPT, tiny_model

BETA, SFT_WEIGHT = 0.5, 0.1
# Largest error that is rounding: of log-probs by their size, of a gradient by its norm.
LOGPS, GRADIENT, RELOAD = 1e-4, 1e-3, 1e-5
# Tokens of prompts and of the responses of a pair; wide ones exceed windows and chunks of 40.
_LENGTHS = {
    False: ((6, (4, 3)), (8, (1, 7)), (2, (8, 3)), (9, (2, 5))),
    True: ((55, (45, 25)), (12, (5, 75)), (150, (70, 35)), (30, (1, 28))),
}

Result = dict[str, Any]


def measure(name: str, wide: bool, *, beside: bool = True) -> Result:
    """Return the record of a family.

    Args:
        name, wide: see `tests.families.tiny_model`.
        beside: also train an adapter and a reward model.

    Returns:
        `result` is `ok`, `refused` (with a reason), `wrong` (with what is off), `crash` or `not swept`;
        `lora` and `reward` have their own.
    """
    begun = time.perf_counter()
    found: Result = {"name": name, "reach": "wide" if wide else "narrow"}
    if name in NOT_SWEPT:
        return found | {"result": "not swept", "reason": NOT_SWEPT[name]}
    pairs = make_pairs(wide)
    try:
        model = tiny_model(name, wide)
        found["class"] = type(model).__name__
        own, exact = _plain_sums(model, pairs), _exact(model)
        expected = _plain_step(exact, pairs)
        found["truth"] = str(next(exact.parameters()).dtype).removeprefix("torch.")
        if not _relative(own, expected[0]) <= LOGPS / 10:
            # Choices of indexers flip by rounding; and an attention of transformers may be another one.
            found["truth"] = "float32"
            expected = _plain_step(copy.deepcopy(model), pairs)
        if not torch.isfinite(expected[0]).all():
            raise ValueError("its log-probs are not finite")
    except Exception as error:  # transformers' own, before anything of this package has run
        return found | {"result": "not swept", "reason": _said(error)}
    found |= _caught(_preference, copy.deepcopy(model), pairs, expected)
    if beside and found["result"] == "ok":
        found["lora"] = _caught(_adapter, copy.deepcopy(model), pairs)
        family = model.config.get_text_config().model_type
        found["reward"] = _caught(_reward, model, pairs) | {"has_class": family in CLASSIFIERS}
    found["seconds"] = round(time.perf_counter() - begun, 2)
    return found


def make_pairs(wide: bool) -> list[dict[str, Any]]:
    """Tokenized preference pairs."""
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> list[int]:
        return torch.randint(6, 100, (n,), generator=generator).tolist()

    return [
        {
            "id": f"pair-{number}",
            "source": "sweep",
            "prompt_ids": tokens(prompt),
            "response_ids": [tokens(n) for n in responses],
            "response_mask": [[1] * n for n in responses],
            "rewards": None,
        }
        for number, (prompt, responses) in enumerate(_LENGTHS[wide])
    ]


# --- the reference ---


def _exact(model: Any) -> Any:
    """A copy in float64 with attention and experts written out, where the family has such ones."""
    exact = copy.deepcopy(model).double()
    inner = transformers_model(exact)
    for implementation in (inner.set_attn_implementation, inner.set_experts_implementation):
        with contextlib.suppress(Exception):
            implementation("eager")
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    try:
        with torch.no_grad():
            if exact(input_ids=ids, use_cache=False).logits.isfinite().all():
                return exact
    except RuntimeError:  # some families compute parts in their own dtype
        pass
    return exact.float()


def _plain_forwards(
    model: nn.Module, pairs: Sequence[dict[str, Any]]
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """`[2 · pairs]`, log π of each response; and the router logits of its forward, `[T, E]` a layer."""
    sums, routers = [], []
    for pair in pairs:
        prompt = pair["prompt_ids"]
        for response in pair["response_ids"]:
            outputs = model(input_ids=torch.tensor([prompt + response]), use_cache=False)
            logps = outputs.logits[0, len(prompt) - 1 : -1].to(torch.float64).log_softmax(-1)
            sums.append(logps.gather(1, torch.tensor(response)[:, None]).sum())
            routers.append(getattr(outputs, "router_logits", None) or ())
    return torch.stack(sums), routers


def _plain_sums(model: nn.Module, pairs: Sequence[dict[str, Any]]) -> Tensor:
    with torch.no_grad():
        return _plain_forwards(model, pairs)[0]


def _plain_step(
    model: nn.Module, pairs: Sequence[dict[str, Any]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradient of the DPO loss with its SFT term where policy = reference.

    The load-balancing loss of routers is added where the model's config asks for it.
    """
    sums, routers = _plain_forwards(model, pairs)
    chosen, rejected = (sums - sums.detach()).reshape(-1, 2).unbind(-1)
    loss = -(BETA * (chosen - rejected)).sigmoid().log().mean() - SFT_WEIGHT * sums[::2].mean()
    text = transformers_model(model).config.get_text_config()
    if getattr(text, "output_router_logits", False) and all(routers):
        layers = tuple(torch.cat(layer) for layer in zip(*routers, strict=True))
        balance = load_balancing_loss_func(layers, layers[0].shape[-1], text.num_experts_per_tok)
        loss = loss + text.router_aux_loss_coef * balance
    loss.backward()
    return sums.detach(), _gradients(model)


def _plain_regression(model: nn.Module, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The gradient of the mean squared error of the scores."""
    inputs = [torch.tensor([row["prompt_ids"] + row["response_ids"][0]]) for row in rows]
    scores = torch.cat([model(input_ids=ids, use_cache=False).logits[:, 0] for ids in inputs])
    ratings = torch.tensor([row["attributes"][0] for row in rows])
    (scores - ratings).square().mean().backward()
    return _gradients(model)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _relative(got: Tensor, expected: Tensor) -> float:
    """The largest difference of sums of log-probs, by their size."""
    return ((got - expected).abs() / expected.abs().clamp_min(1.0)).max().item()


def _off(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second."""
    zero = torch.zeros(())
    difference = sum(
        (got.get(name, zero).double() - expected.get(name, zero).double()).square().sum()
        for name in {*got, *expected}
    )
    norm = sum(grad.double().square().sum() for grad in expected.values())
    return float((difference / norm) ** 0.5)


# --- what the trainers do ---


def _preference(
    model: Any, pairs: list[dict[str, Any]], expected: tuple[Tensor, dict[str, Tensor]]
) -> Result:
    sums, gradient = expected
    with _trained(DPOTrainer, model, pairs) as (trainer, got, folder):
        found: Result = {
            "layout": trainer.layout, "fused": transformers_model(trainer.model)._rpo_head.fused
        }  # fmt: skip
        logps = torch.from_numpy(trainer.train_dataset.extra["reference_logps"].values)
        found["logps_off"] = _relative(logps, sums)
        found["gradient_off"] = _off(got, gradient)
        trainer.save_model(f"{folder}/saved")
        uninstall(trainer.model)
        again, found["loads_by"] = _loaded(type(model), f"{folder}/saved")
        after, before = (_plain_sums(m.eval(), pairs) for m in (again, trainer.model))
        found["reload_off"] = (after - before).abs().max().item()
    limits = {"logps_off": LOGPS, "gradient_off": GRADIENT, "reload_off": RELOAD}
    return _judged(found, limits)


def _loaded(kind: Any, folder: str) -> tuple[Any, str]:
    """The saved model by its config alone, or by its class where transformers has no other way."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "config"
    except ValueError:
        return kind.from_pretrained(folder, dtype=torch.float32), "class"


def _adapter(model: Any, pairs: list[dict[str, Any]]) -> Result:
    """LoRA on `all-linear`: the gradient of its first step, then merged, which compares the answers."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = copy.deepcopy(model)
    expected: dict[str, Tensor] = {}

    def before(trainer: Any) -> None:
        # As the trainer's own: towers of multimodal models are left out.
        own = trainer.model.peft_config["default"]
        twin: Any = peft.get_peft_model(plain, copy.deepcopy(own))
        twin.load_state_dict(trainer.model.state_dict())
        expected.update(_plain_step(_exact(twin.eval()), pairs)[1])

    with _trained(DPOTrainer, model, pairs, before=before, peft_config=config) as run:
        trainer, got, _ = run
        experts = [
            name
            for name, p in trainer.model.named_parameters()
            if "expert" in name and not p.requires_grad and p.ndim == 3
        ]
        found: Result = {"gradient_off": _off(got, expected), "untrained_experts": bool(experts)}
        uninstall(trainer.model)
        adapters.merged(trainer.model)
    return _judged(found, {"gradient_off": GRADIENT})


def _reward(model: Any, pairs: list[dict[str, Any]]) -> Result:
    """A reward model made of the language model: the gradient of a step of regression."""
    rows = [
        {
            **pair,
            "id": f"{pair['id']}-{number}",
            "response_ids": [response],
            "response_mask": [[1] * len(response)],
            "attributes": [float(number)],
        }
        for pair in pairs
        for number, response in enumerate(pair["response_ids"])
    ]
    scorer = as_reward_model(model, attributes=("quality",))
    text = scorer.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = (
            False  # no plain forward of a classifier gives the routers' loss
        )
    expected = _plain_regression(_exact(scorer.eval()), rows)
    with _trained(RewardTrainer, scorer, rows) as (trainer, got, _):
        found: Result = {"layout": trainer.layout, "gradient_off": _off(got, expected)}
    return _judged(found, {"gradient_off": GRADIENT})


class _Gradients(TrainerCallback):
    """Keeps the gradient of the last step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.found |= {name: grad.clone() for name, grad in _gradients(model).items()}


@contextlib.contextmanager
def _trained(
    kind: Any,
    model: Any,
    rows: list[dict[str, Any]],
    *,
    before: Callable[[Any], None] = lambda trainer: None,
    **kwargs: Any,
) -> Iterator[tuple[Any, dict[str, Tensor], str]]:
    """A trainer after one step over all rows, the gradient of that step, and a folder."""
    preference = kind is DPOTrainer
    settings = (
        {"beta": BETA, "sft_loss_weight": SFT_WEIGHT}
        if preference
        else {"objective": "regression", "attributes": ["quality"]}
    )
    gradients = _Gradients()
    with tempfile.TemporaryDirectory() as folder:
        config = (DPOConfig if preference else RewardConfig)(
            output_dir=folder, per_device_train_batch_size=len(rows) // 2, max_steps=1,
            global_batch_size=len(rows), learning_rate=0.01, optim="sgd", max_grad_norm=0.0,
            max_length=None, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True,
            **settings,
        )  # fmt: skip
        trainer = kind(
            model=model, args=config, train_dataset=Examples(rows), callbacks=[gradients],
            processing_class=character_tokenizer(), **kwargs,
        )  # fmt: skip
        before(trainer)
        with contextlib.redirect_stdout(None):
            trainer.train()
        yield trainer, gradients.found, folder


# --- how it ended ---


def _judged(found: Result, limits: dict[str, float]) -> Result:
    wrong = [name for name, limit in limits.items() if not found[name] <= limit]
    return found | ({"result": "wrong", "reason": ", ".join(wrong)} if wrong else {"result": "ok"})


def _caught(run: Callable[..., Result], *args: Any) -> Result:
    """The result of a check, with what this package said while it ran."""
    lines = _Lines()
    package = logging.getLogger("rpo_trainer")
    package.addHandler(lines)
    try:
        found = run(*args)
    except RPOTrainerError as error:
        found = {"result": "refused", "reason": error.what, "why": error.why}
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
        found = {"result": "crash", "reason": f"{_said(error)} at {place}"}
    finally:
        package.removeHandler(lines)
    return found | {"said": lines.found}


class _Lines(logging.Handler):
    """Keeps the warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "without a message"
    return f"{type(error).__name__}: {text[:200]}"
