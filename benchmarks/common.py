"""What the benchmarks share: a model, rows of given lengths, the work of a step, a machine's speed.

Shapes: prompts of `p` tokens, responses of `r`, K responses each. Lengths vary by ± 25 % around the given
ones, as real ones do, unless they come from a file.
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
    """A Llama's dimensions; `tied`: the head is the embedding table."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int = 32000
    tied: bool = False


SIZES = {
    # 42 M parameters take part in a token's forward (the embedding table does not).
    "42m": Shape(512, 8, 8, 8, 1376),
    "smollm2": Shape(576, 30, 9, 3, 1536, 49152, tied=True),  # SmolLM2-135M
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, tied=True),  # Llama-3.2-1B
    "8b": Shape(4096, 32, 32, 8, 14336, 128256),  # Llama-3.1-8B
    "tiny": Shape(64, 2, 4, 2, 128),
}


class _Parser(argparse.ArgumentParser):
    """Fills in the vocabulary of the size."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if found.vocabulary is None:
            found.vocabulary = SIZES[found.size].vocabulary
        return found, rest


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark can be told."""
    made = _Parser(description=(description or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("--size", default="42m", choices=SIZES)
    made.add_argument("--vocabulary", type=int, help="default: that of the size")
    made.add_argument("--dtype", default="float32", help="of the weights, and so of everything")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--tile-mib", type=int, default=512, help="most memory of one tile of logits")
    made.add_argument("--json", type=Path, metavar="FILE", help="append the result as one line")
    return made


def make_model(size: str, vocabulary: int, *, dtype: str) -> Any:
    """A random Llama on the device; the same one for every call."""
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
    """One token a word, `w2` to `w<V-1>`, so that lengths are exact for both."""
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
        """As our trainers take it, best response first."""
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
    """Random tokens; `lengths` (prompt, responses) are used in turn."""
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
    """Prompt and response lengths of real rows, in tokens: `count` of them, evenly spread over their totals.

    Args:
        path: `prompt,chosen,rejected` as CSV; or JSONL of pairs, tokens then estimated from characters.
        k: responses each; those of a pair are used in turn.
        longest: rows with a longer part, or one of less than two tokens, are left out.
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
    """Until the device has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def matmul_flops(dtype: str, *, seconds: float = 1.5) -> float:
    """Floating-point operations per second of a large matrix product, measured now."""
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
    """Model FLOPs of one forward and backward with each prompt once: 6 per weight and token.

    The head counts for response tokens alone, tied or not: a look-up in the table multiplies nothing.
    Attention scores are left out, as is usual.
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
    """No bars and no log lines in a measurement's output."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
