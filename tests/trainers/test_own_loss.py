"""A registered custom loss is one entry: configs, recipes, messages and the step-0 check support it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_trainer.cli import commands as cli
from rpo_trainer.errors import Problems, RecipeError
from rpo_trainer.losses import LOSSES, Loss, preference_loss, step_zero_losses
from rpo_trainer.recipe import json_schema, load_recipe
from tests.chain import tiny
from tests.raising import raises
from tests.trainers.plain import assert_same_update, plain_reference, plain_sums, rows_of

BETA = 0.1


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`best`: −log of the first response's probability among K; `rpo_abs`: |a − b| of pairs."""
    entries = {
        "best": Loss(
            "−log softmax of the first response",
            kind="dpo",
            losses=lambda x: -x.implicit.log_softmax(-1)[:, 0],
            step_zero=lambda x: math.log(x.implicit.shape[1]),
        ),
        "rpo_abs": Loss(
            "distance of the gaps",
            kind="rpo",
            losses=lambda x: ((x.implicit - x.target) @ x.target.new_tensor([1.0, -1.0])).abs(),
            step_zero=lambda x: (x.target[:, 0] - x.target[:, 1]).abs(),
            pairs_only=True,
            saturates=True,
        ),
    }
    for name, loss in entries.items():
        monkeypatch.setitem(LOSSES, name, loss)


def formula(name: str, implicit: Any, rewards: list[float] | None) -> Any:
    if name == "best":
        return -(implicit.exp()[0] / implicit.exp().sum()).log()
    assert rewards is not None
    return (implicit[0] - implicit[1] - (rewards[0] - rewards[1])).abs()


@pytest.mark.parametrize(
    ("kind", "name", "ks"), [("dpo", "best", (2, 3, 5, 2)), ("rpo", "rpo_abs", (2,) * 4)]
)
def test_a_trainer_takes_it_with_its_step_zero_check(kind, name, ks, own, start, make_trainer):
    rows = rows_of(kind, ks)
    trainer = make_trainer(
        kind, copy.deepcopy(start), rows, loss_type=name, beta=BETA, global_batch_size=4
    )
    trainer.train()
    reference, expected = plain_reference(start, rows), copy.deepcopy(start)
    losses = [
        formula(name, BETA * (plain_sums(expected, row) - reference[row["id"]]), row.get("rewards"))
        for row in rows
    ]
    loss = sum(losses) / len(losses)
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    assert_same_update(start, trainer.model, expected, 1e-5)
    assert trainer.step_zero["expected"] == pytest.approx(loss.item(), abs=1e-5)
    assert trainer.step_zero["loss"] == pytest.approx(loss.item(), abs=1e-5)


def recipe(*losses: tuple[str, str], **more: Any) -> tiny.Recipe:
    """A stage for each (kind, loss), the one of kind dpo on all three responses of each row."""
    made = tiny.tiny_recipe()
    made["stages"] = [
        {
            "name": kind, "kind": kind, "loss_type": loss, "beta": 0.5, "max_steps": 1, **more,
            "data": {
                "train": [{"path": "rows.jsonl"}],
                "pairs": {"select": "all_responses" if kind == "dpo" else "best_worst"},
            },
        }
        for kind, loss in losses
    ]  # fmt: skip
    return made


def test_a_recipe_trains_with_it(own, tmp_path: Path):
    rows = [
        {"prompt": f"{n} + 1 = ", "responses": [f"{n + 1}", "0", "x"], "rewards": [3, 2, 0.5]}
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tiny.write_recipe(tmp_path, recipe(("dpo", "best"), ("rpo", "rpo_abs")))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(path), "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 0
    first = {line["stage"]: line["loss/preference"] for line in tiny.metrics(tmp_path / "run")}
    assert first == {"dpo": pytest.approx(math.log(3)), "rpo": pytest.approx(2.5)}


def refused(folder: Path, recipe: tiny.Recipe) -> str:
    with pytest.raises((Problems, RecipeError)) as caught:
        tiny.load(folder, recipe)
    return str(caught.value)


def test_messages_and_the_schema_name_it(own, tmp_path: Path, make_config):
    assert load_recipe(tiny.write_recipe(tmp_path, recipe(("dpo", "best")))).recipe.stages
    assert "`dpo`, `ipo`, `best`" in refused(tmp_path, recipe(("dpo", "bes")))
    wrong = refused(tmp_path, recipe(("dpo", "rpo_abs")))
    assert "`rpo_abs`" in wrong and "kind rpo" in wrong
    assert "`rpo_bwd_kl`, `rpo_fwd_kl`, `rpo_sqloo`, `best`" in wrong
    smoothing = refused(tmp_path, recipe(("dpo", "best"), label_smoothing=0.1))
    assert "`loss_type: best`" in smoothing and "`label_smoothing`" in smoothing
    defs = json_schema()["$defs"]
    offered = {k: defs[f"{k}Stage"]["properties"]["loss_type"]["enum"] for k in ("DPO", "RPO")}
    assert offered["DPO"] == ["dpo", "ipo", "best"] and offered["RPO"][-1] == "rpo_abs"
    with raises("training.invalid-value", RecipeError, settings=["loss_type"]) as error:
        make_config("dpo", loss_type="rpo_abs")
    assert "dpo, ipo, best" in str(error.value)
    with raises("training.no-effect", RecipeError, settings=["label_smoothing"]):
        make_config("dpo", loss_type="best", label_smoothing=0.1)


def test_a_name_that_nobody_registered_is_refused_with_the_list(tmp_path: Path, make_config):
    assert "`dpo`, `ipo`, got" in refused(tmp_path, recipe(("dpo", "best")))
    with raises("training.invalid-value", RecipeError, settings=["loss_type"]):
        make_config("dpo", loss_type="best")
    with pytest.raises(ValueError, match=r"'best'.* dpo, ipo, rpo_bwd_kl"):
        preference_loss(torch.zeros(1, 2), torch.zeros(1, 2), loss_type="best", beta=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sft"}, "kind .*'sft'"),
        ({"kind": "rpo", "label_smoothing": True}, "^label_smoothing .*kind dpo"),
        ({"saturates": True}, "^saturates .*kind rpo"),
    ],
)
def test_an_entry_with_what_could_not_act_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Loss(**{"description": "", "kind": "dpo", "losses": len, "step_zero": len, **change})


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda x: x.implicit.sum(), r"losses of own must be \[B\] = \[2\], got \[\]"),
        (lambda x: x.target.sum(-1), "kind dpo .*no rewards"),
    ],
)
def test_a_function_that_does_not_fit_its_entry_says_so(losses, message, monkeypatch):
    monkeypatch.setitem(LOSSES, "own", Loss("", kind="dpo", losses=losses, step_zero=losses))
    logps = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=message):
        preference_loss(logps, logps, loss_type="own", beta=0.1)
    with pytest.raises(ValueError, match=message.replace("losses of own", "step_zero of own")):
        step_zero_losses("own", beta=0.1, shape=(2, 2))
