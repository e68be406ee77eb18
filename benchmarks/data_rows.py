"""Rows, tokenizer, model and recipe of benchmarks/data.py.

Kinds: `pair` (prompt, chosen, rejected; for DPO), `sft` (messages), and `k4` (prompt, four responses, a
reward each; for RPO).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]
KINDS = ("pair", "sft", "k4")
VOCABULARY = 4096
MAX_LENGTH = 2048
_STAGES: dict[str, dict[str, Any]] = {
    # Without the step-0 check, because the reference log-probs are zeros (data_child.py).
    "pair": {"kind": "dpo", "beta": 0.1, "step0_check": False},
    "sft": {"kind": "sft"},
    "k4": {"kind": "rpo", "beta": 0.1, "step0_check": False},
}
# ChatML; the marks of generated text are those that TRL requires for `assistant_only_loss`.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def base_rows(kind: str, path: Path | None) -> list[Row]:
    """Return the rows of a JSONL file, or 1,000 made of random words with the lengths of UltraFeedback."""
    if path is not None:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    lengths = common.lengths_of(Path(__file__).with_name("ultrafeedback.csv"), 400, 4)
    rng = random.Random(0)
    syllables = [a + b for a in "bdfklmnprstv" for b in ("a", "e", "i", "o", "u", "en", "or")]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(5000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(tokens: int) -> str:
        return " ".join(rng.choices(words, cum_weights=weights, k=max(2, round(tokens * 0.75))))

    rows = []
    for i in range(1000):
        prompt, responses = lengths[i % len(lengths)]
        rows.append(_row(kind, text(prompt), [text(length) for length in responses]))
    return rows


def _row(kind: str, prompt: str, responses: list[str]) -> Row:
    user = [{"role": "user", "content": prompt}]
    answers = [[{"role": "assistant", "content": text}] for text in responses]
    if kind == "sft":
        return {"messages": user + answers[0]}
    if kind == "pair":
        return {"prompt": user, "chosen": answers[0], "rejected": answers[1]}
    return {"prompt": user, "responses": responses, "rewards": [3.0, 2.0, 1.0, 0.0]}


def write_rows(base: list[Row], count: int, path: Path) -> None:
    """Write `count` different rows: those of `base` in turn, each text with the number of the row."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in zip(range(count), itertools.cycle(base), strict=False):
            file.write(json.dumps(_numbered(row, f" ({number})"), ensure_ascii=False) + "\n")


def _numbered(value: Any, mark: str) -> Any:
    if isinstance(value, str):
        return value + mark
    if isinstance(value, list):
        return [_numbered(item, mark) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key in ("role", "rewards") else _numbered(item, mark)
            for key, item in value.items()
        }
    return value


def texts_of(value: Any) -> Iterator[str]:
    """Yield the texts of a row: contents of messages and responses."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "rewards"):
                yield from texts_of(item)


def write_model(base: list[Row], folder: Path) -> None:
    """Write a Llama with few weights, and a byte-level BPE tokenizer trained on the rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(base[:1000]), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    common.make_model("nano", VOCABULARY, dtype="float32").cpu().save_pretrained(folder)


def write_recipe(kind: str, source: Path, model: Path, path: Path, **more: Any) -> None:
    """Write a recipe of one stage, as JSON, which is YAML."""
    stage = {
        "name": "stage",
        **_STAGES[kind],
        "data": {"train": [{"path": str(source)}], "eval": []},
        "max_length": MAX_LENGTH,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "learning_rate": 1e-6,
        "save_steps": 1_000_000,
        **more,
    }
    recipe = {"model": {"name_or_path": str(model), "dtype": "float32"}, "stages": [stage]}
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
