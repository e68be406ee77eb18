"""Metrics under TRL's names, compared with plain logits in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.trainers.plain import PAIRS, make_rows, rows_of

NAMES = ("mean_token_accuracy", "entropy")


def plain(model: Any, rows: Any) -> dict[str, float]:
    """The metrics from one forward of the model per response."""
    found: dict[str, list[float]] = {
        name: [] for name in (*NAMES, "logits/chosen", "logits/rejected")
    }
    model.eval()
    for row in rows:
        for number, (response, mask) in enumerate(
            zip(row["response_ids"], row["response_mask"], strict=True)
        ):
            ids = torch.tensor([*row["prompt_ids"], *response])[None]
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[
                    0, len(row["prompt_ids"]) - 1 : -1
                ]
            for x, label, trained in zip(logits, response, mask, strict=True):
                if trained:
                    found["entropy"].append(torch.special.entr(x.softmax(-1)).sum().item())
                    found["logits/chosen" if number == 0 else "logits/rejected"].append(
                        x.mean().item()
                    )
                    if number == 0:
                        found["mean_token_accuracy"].append(float(x.argmax() == label))
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def tokens(rows: Any) -> int:
    return sum(len(r["prompt_ids"]) + len(ids) for r in rows for ids in r["response_ids"])


@pytest.mark.parametrize("layout", ["shared", "packed", "padded", "single"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_as_from_plain_logits(kind: str, layout: str, start: Any, make_trainer: Any) -> None:
    rows = rows_of("dpo", PAIRS) if kind == "dpo" else make_rows(0, (1,) * 8, spans=True)
    model = copy.deepcopy(start)
    trainer = make_trainer(
        kind, model, rows, eval_rows=rows, layout=layout, global_batch_size=len(rows),
        logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    expected = plain(copy.deepcopy(start), rows)
    if kind == "sft":
        expected = {name: expected[name] for name in NAMES}
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert logged["num_tokens"] == tokens(rows)
    evaluated, after = trainer.evaluate(), plain(trainer.model, rows)
    for name in expected:
        assert evaluated[f"eval_{name}"] == pytest.approx(after[name], abs=1e-9)


def test_a_trained_head_of_an_adapter_has_them_too(start: Any, make_trainer: Any) -> None:
    from peft import LoraConfig

    rows = rows_of("dpo", PAIRS)
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows, peft_config=lora, global_batch_size=len(rows),
        logging_strategy="steps", logging_steps=1, gradient_checkpointing=True,
    )  # fmt: skip
    expected = plain(copy.deepcopy(start), rows)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_the_number_of_tokens_goes_on_after_a_resume(
    start: Any, make_trainer: Any, tmp_path: Any
) -> None:
    rows = make_rows(0, (1,) * 8)
    settings: dict[str, Any] = {
        "logging_strategy": "steps", "logging_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "global_batch_size": 4, "max_steps": 4,
    }  # fmt: skip
    whole = make_trainer("sft", copy.deepcopy(start), rows, **settings)
    whole.train()
    resumed = make_trainer("sft", copy.deepcopy(start), rows, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    counts = [
        [e["num_tokens"] for e in t.state.log_history if "num_tokens" in e]
        for t in (whole, resumed)
    ]
    assert counts[0] == counts[1] and counts[0][-1] == 2 * tokens(rows)
