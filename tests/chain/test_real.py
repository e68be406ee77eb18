"""The chain of recipes/real/small.yaml with the model that it names, on a few rows and for a few steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo_trainer.chain import run_chain
from rpo_trainer.data import Audit, tokenize_rows
from rpo_trainer.recipe import load_recipe
from rpo_trainer.recipe.schema import GenerateSpec
from rpo_trainer.rewards.evaluate import respond
from tests.chain import tiny
from tests.real_data import prepared, turns

pytest.importorskip("peft")
MODEL = os.environ.get("RPO_TRAINER_SMOLLM2", "")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not MODEL, reason="RPO_TRAINER_SMOLLM2 does not name a folder with SmolLM2-135M-Instruct"
    ),
]

END = "<|im_end|>"
PERSONA = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SAMPLED = {"rpo-math": 3, "rpo-code": 2, "rpo-instructions": 4}  # prompts of each round
K = 4
SMALL = [
    f"model.name_or_path={MODEL}", "model.dtype=float32", "eval=null", "defaults.logging_steps=1",
    "stages.general-sft.data.replay.fraction=0.1", "stages.general-sft.max_steps=1",
    "stages.general-sft.num_train_epochs=null", "stages.dpo.data.train.0.max_rows=4",
    "stages.rpo-instructions.data.train.0.max_rows=4",
    *(f"stages.{stage}.data.generate.{field}" for stage in SAMPLED
      for field in (f"responses={K}", "max_new_tokens=24")),
]  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory; the recipe and its data are next to it."""
    folder = tmp_path_factory.mktemp("real")
    prepared(folder)
    return run_chain(load_recipe(folder / "small.yaml", SMALL), folder / "run")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_stage_ends_and_starts_at_its_reference(ran: Path) -> None:
    records = tiny.records(ran)
    assert len(records) == 6 and {record["state"] for record in records.values()} == {"done"}
    for name in ("dpo", *SAMPLED):
        check = records[name]["step0"]
        assert check["ok"] and check["nats_per_token"] < 1e-4, name
    assert len(set(tiny.weights(ran).values())) == 6


def test_the_end_is_trained_though_it_is_the_padding_and_the_persona_is_not(tokenizer: Any) -> None:
    assert tokenizer.pad_token == tokenizer.eos_token == END
    row = {"id": "a", "source": "s", "messages": turns("Hi", "Hello.", "And?", "Bye.")}
    found = tokenize_rows(
        [row], tokenizer, kind="sft", max_length=99, truncation="drop", audit=Audit()
    )
    prompt, (ids,), (mask,) = (found[0][c] for c in ("prompt_ids", "response_ids", "response_mask"))
    assert tokenizer.decode(prompt).startswith(f"<|im_start|>system\n{PERSONA}{END}\n")
    trained = [token for token, own in zip(ids, mask, strict=True) if own]
    assert tokenizer.decode(trained) == f"Hello.{END}Bye.{END}"


def test_the_first_loss_is_that_of_a_plain_forward(ran: Path, tokenizer: Any) -> None:
    """Sum over the answer and its end token, after the prompt with the persona; other sums differ."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    nll, ends = [], []
    for row in rows(ran.parent / "data" / "mbpp_train.jsonl"):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=False
        )
        assert PERSONA in prompt
        own = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([own + tokenizer(f"{row['response']}{END}")["input_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        each = -logps.gather(1, ids[0, 1:, None])[len(own) - 1 :, 0]
        nll.append(each)
        ends.append(each[-1])
    first = next(m for m in tiny.metrics(ran) if m["stage"] == "code-sft" and "loss" in m)
    tokens = torch.cat(nll)
    assert first["loss"] == pytest.approx(tokens.mean().item(), abs=2e-4)
    without = (tokens.sum() - sum(ends)) / (len(tokens) - len(ends))
    assert abs(without.item() - tokens.mean().item()) > 2e-3


def test_every_round_of_rpo_has_its_samples_and_some_end(ran: Path) -> None:
    finished = []
    for name, prompts in SAMPLED.items():
        (file,) = (ran / name).glob("generated-*.jsonl")
        found = rows(file)
        truth = int(name != "rpo-instructions")
        assert len(found) == prompts
        for row in found:
            assert len(row["responses"]) == len(row["rewards"]) == K + truth
            assert not any("<|im_" in response for response in row["responses"])
            if truth:  # the solution of the data set is correct by its verifier
                assert row["rewards"][row["policies"].index("ground_truth")] == 1
            finished += row["finished"][:K]
    assert any(finished) and not all(finished)


def test_the_last_model_ends_by_itself(ran: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(ran / "rpo-instructions" / "final").eval()
    spec = GenerateSpec(responses=1, top_k=1, max_new_tokens=80, batch_size=2)
    asked = [{"id": str(i), "prompt": turns(q)} for i, q in enumerate(("Say hello.", "2 + 2?"))]
    for answer in respond(model, tokenizer, asked, generate=spec, greedy=False, seed=0):
        assert answer["finished"] == [True] and answer["responses"][0].strip()


def test_it_resumes_as_finished(ran: Path) -> None:
    before = tiny.content(ran)
    run_chain(load_recipe(ran.parent / "small.yaml", SMALL), ran)
    after = tiny.content(ran)
    assert {p for p in {*before, *after} if "/" in p and before.get(p) != after.get(p)} == set()
