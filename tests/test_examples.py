"""Each program of examples/ runs unchanged, with its documented result."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

EXAMPLES = Path(__file__).parents[1] / "examples"

Run = Callable[[str], dict[str, Any]]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a program in an empty directory, as `python examples/NAME.py` does; return its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # restore what an Accelerator sets
    _forget()
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    _forget()


def _forget() -> None:
    """Reset the state that accelerate keeps per process, which a separate program would not have."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def column(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_every_example_is_tested() -> None:
    tested = {"own_accelerator", "wrapped_model", "own_callback", "own_dataset"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested | {"tiny"}


def test_an_accelerator_already_made(example: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = example("own_accelerator")
    trainer, gaps = made["trainer"], made["gaps"]
    assert made["accelerator"] is not trainer.accelerator
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.step_zero["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert gaps[-1] > gaps[0] + 0.01 and len(gaps) == 6
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    trained = trainer.model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in saved.state_dict().items())


def test_a_model_wrapped_already(example: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = example("wrapped_model")
    trainer = made["trainer"]
    assert trainer.model is made["policy"] and trainer.ref_model is None
    assert trainer.step_zero["nats_per_token"] < 1e-5
    # The reference is the adapter that SFT has trained, not the model below it.
    (start,) = column(trainer, "logps/chosen_delta")[:1]
    assert start == pytest.approx(0.0, abs=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)


def test_a_callback_of_ones_own(example: Run) -> None:
    made = example("own_callback")
    falling = column(made["trainer"], "logps/chosen_falling")
    assert 1 < len(falling) < made["args"].max_steps
    assert falling[-1] > 0.5 and all(share <= 0.5 for share in falling[1:-1])


def test_a_data_set_of_ones_own(example: Run) -> None:
    made = example("own_dataset")
    trainer = made["trainer"]
    assert len(trainer.train_dataset) == len(made["ROWS"]) == 16
    assert column(trainer, "rewards/target_gap") == pytest.approx([3.0] * 6)
    assert trainer.step_zero["nats_per_token"] < 1e-5
