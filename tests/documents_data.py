"""Files that the documentation calls ./base-model, ./model, pairs.jsonl and so on, created for the tests.

The questions are sums with a one-digit answer, so that a numeric verifier can score the responses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.data.templates import CHATML, CHATML_TOKENS
from tests.rewards.policies import llama, next_token_model
from tests.rewards.test_reward_model import save_model

Row = dict[str, Any]
STORIES = ("relevance", "coherence", "empathy", "surprise", "engagement", "complexity")
SUMS = [(n, m) for n in range(4) for m in range(4)]


def conversation(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(kind: str, *, messages: bool = False) -> list[Row]:
    """Rows of a kind (see `_rest`), as text or as messages if the kind supports both."""

    def said(role: str, text: str) -> Any:
        return conversation(role, text) if messages else text

    made = []
    for n, m in SUMS:
        asked, right, wrong = f"{n} + {m} = ", str(n + m), str(n + m + 1)
        if kind == "sft" and messages:
            made.append({"messages": said("user", asked) + said("assistant", right)})
            continue
        rewards = [4.0 + n / 10, 1.0 + m / 2]
        answers = (said("assistant", right), said("assistant", wrong))
        made.append({"prompt": said("user", asked), **_rest(kind, answers, rewards, n + m)})
    return made


def _rest(kind: str, answers: tuple[Any, Any], rewards: list[float], number: int) -> Row:
    right, wrong = answers
    if kind == "pairs":
        return {
            "chosen": right, "rejected": wrong,
            "chosen_reward": rewards[0], "rejected_reward": rewards[1],
        }  # fmt: skip
    rated = 1 + number % 4
    return {
        "sft": {"response": right},
        "prompts": {"ground_truth": right},
        "many": {"responses": [right, wrong], "rewards": rewards, "ground_truth": right},
        "helpsteer2": {"response": right, **dict.fromkeys(HELPSTEER_ATTRIBUTES, rated)},
        "score": {"response": right, "score": rated},
        "stories": {"response": right, "ratings": dict.fromkeys(STORIES, rated)},
        "canonical_solution": {"canonical_solution": right},
        "answer_raw": {"answer_raw": right},
    }[kind]


def write(path: Path, lines: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")


def save_base_model(folder: Path) -> None:
    """A random model with the tokens and template of ChatML, and a context of 4096 tokens."""
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML_TOKENS)})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    llama(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)


def save_policy(folder: Path) -> None:
    """A model that answers every sum with 2, 3 or 4."""
    figures = dict.fromkeys("234", 1 / 3)
    model = next_token_model({" ": figures} | {figure: {"</s>": 1.0} for figure in figures})
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def save_reward_model(folder: Path) -> None:
    save_model(folder)
