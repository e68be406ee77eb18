"""Common parts of the benchmarks: models, rows of given lengths, FLOPs of a step, speed of the machine.

Shapes: prompts of `p` tokens with K responses of `r` tokens each. Lengths vary by ± 25 % around the given
ones, unless they come from a file.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama; `tied`: the head is the embedding table."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int = 32000
    tied: bool = False


SIZES = {
    # 42 M parameters without the embedding table
    "42m": Shape(512, 8, 8, 8, 1376),
    "smollm2": Shape(576, 30, 9, 3, 1536, 49152, tied=True),  # SmolLM2-135M
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, tied=True),  # Llama-3.2-1B
    "8b": Shape(4096, 32, 32, 8, 14336, 128256),  # Llama-3.1-8B
    "tiny": Shape(64, 2, 4, 2, 128),
    "nano": Shape(8, 1, 1, 1, 16),  # benchmarks/data.py: almost no model
}


class _Parser(argparse.ArgumentParser):
    """Sets the default of --vocabulary to that of the size."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if found.vocabulary is None:
            found.vocabulary = SIZES[found.size].vocabulary
        return found, rest


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the common options."""
    made = _Parser(description=(description or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("--size", default="42m", choices=SIZES, help="model size")
    made.add_argument("--vocabulary", type=int, help="vocabulary size; default: that of --size")
    made.add_argument(
        "--dtype", default="float32", help="dtype of weights, gradients and optimizer state"
    )
    made.add_argument("--rounds", type=int, default=3, help="number of measured rounds")
    made.add_argument(
        "--tile-mib", type=int, default=512, help="maximum size of a tile of logits, in MiB"
    )
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="append the result to FILE as one line"
    )
    return made


def make_model(size: str, vocabulary: int, *, dtype: str) -> Any:
    """Return a random Llama on the device; every call returns equal weights."""
    shape = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


@functools.cache
def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, `w2` to `w<V-1>`, so that lengths are exact."""
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )


@dataclass
class Row:
    """One prompt and its responses, as token ids; the last token of a response is the end token."""

    prompt: list[int]
    responses: list[list[int]]

    def example(self, number: int) -> dict[str, Any]:
        """Return an example for rpo-trainer's trainers, best response first."""
        return {
            "id": str(number),
            "source": "bench",
            "prompt_ids": self.prompt,
            "response_ids": self.responses,
            "response_mask": [[1] * len(response) for response in self.responses],
            "rewards": [float(-k) for k in range(len(self.responses))],
        }


def make_rows(
    count: int,
    lengths: Sequence[tuple[int, Sequence[int]]],
    vocabulary: int,
    *,
    jitter: float = 0.25,
) -> list[Row]:
    """Return rows of random tokens; `lengths` (prompt, responses) are used in turn."""
    rng = random.Random(0)

    def tokens(n: int) -> list[int]:
        n = max(2, round(n * rng.uniform(1 - jitter, 1 + jitter)))
        return [rng.randrange(2, vocabulary) for _ in range(n)]

    rows = []
    for i in range(count):
        prompt, responses = lengths[i % len(lengths)]
        rows.append(Row(tokens(prompt), [[*tokens(n - 1), 1] for n in responses]))
    return rows


def lengths_of(
    path: Path, count: int, k: int, *, longest: int = 1024, characters_per_token: float = 4.0
) -> list[tuple[int, list[int]]]:
    """Return the prompt and response lengths, in tokens, of `count` real rows, evenly spaced by total length.

    Args:
        path: CSV with the lengths `prompt,chosen,rejected`, or JSONL of pairs (tokens are then estimated from
            characters).
        k: responses per prompt; the lengths of a pair are used in turn.
        longest: rows with a longer part, or with a part of fewer than two tokens, are excluded.
    """
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            found = [[int(n) for n in row] for row in itertools.islice(csv.reader(file), 1, None)]
        else:
            found = [
                [
                    round(_characters(json.loads(line)[name]) / characters_per_token)
                    for name in _PAIR
                ]
                for line in file
            ]
    found = sorted(
        (row for row in found if all(2 <= n <= longest for n in row)),
        key=lambda row: (sum(row), row),
    )
    picked = [found[(2 * i + 1) * len(found) // (2 * count)] for i in range(count)]
    random.Random(0).shuffle(picked)
    return [(prompt, list(itertools.islice(itertools.cycle(rest), k))) for prompt, *rest in picked]


_PAIR = ("prompt", "chosen", "rejected")


def _characters(text: Any) -> int:
    return len(text if isinstance(text, str) else json.dumps(text))


def wait() -> None:
    """Synchronize with the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def matmul_flops(dtype: str, *, seconds: float = 1.5) -> float:
    """Measure the floating-point operations per second of a large matrix product."""
    n = 8192 if DEVICE == "cuda" else 1536
    a, b = (torch.randn(n, n, device=DEVICE, dtype=getattr(torch, dtype)) for _ in range(2))
    best = 0.0
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def step_flops(rows: Sequence[Row], size: str, vocabulary: int) -> float:
    """Return the model FLOPs of a forward and backward pass, each prompt counted once.

    6 per weight and token. The head counts for response tokens only, the embedding table not at all;
    attention scores are omitted, as is usual.
    """
    shape = SIZES[size]
    hidden = shape.hidden
    kv = shape.kv_heads / shape.heads
    body = shape.layers * (hidden * hidden * (2 + 2 * kv) + 3 * hidden * shape.inner)
    tokens = sum(len(row.prompt) + sum(map(len, row.responses)) for row in rows)
    responses = sum(sum(map(len, row.responses)) for row in rows)
    return 6.0 * (body * tokens + hidden * vocabulary * responses)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and log lines."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
