"""What the benchmarks share: a model, pairs of given lengths, and timed training of ours and of a peer.

Shapes: prompts of `p` tokens, responses of `r`, K responses each. Lengths vary by ± 25 % around the given
ones, as real ones do, unless they come from a file.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

SIZES: dict[str, dict[str, int]] = {
    # 42 M parameters take part in a token's forward (the embedding table does not).
    "42m": {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 8, "inner": 1376},
    "1b": {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "inner": 8192},
    "tiny": {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 128},
}


def make_model(size: str, vocabulary: int, *, dtype: torch.dtype, device: str) -> Any:
    """A random Llama; the same one for every call."""
    shape = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=dtype)


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
    path: Path, limit: int, *, characters_per_token: float = 4.0
) -> list[tuple[int, list[int]]]:
    """Prompt and response lengths in tokens, estimated from the characters of a JSONL file of pairs."""
    found = []
    for line in path.read_text().splitlines()[:limit]:
        row = json.loads(line)
        prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"])
        sizes = [
            len(text) / characters_per_token for text in (prompt, row["chosen"], row["rejected"])
        ]
        if all(2 <= size <= 1024 for size in sizes):
            found.append((round(sizes[0]), [round(sizes[1]), round(sizes[2])]))
    return found


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, device work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self._start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(trainers: dict[str, tuple[Any, StepTimes]], rounds: int) -> dict[str, list[float]]:
    """Trains each in turn, round after round; the first step of each training is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, (trainer, times) in trainers.items():
            times.seconds.clear()
            with quiet():
                trainer.train()
            seconds[name] += times.seconds[1:]
    return seconds


def ratios(seconds: dict[str, list[float]], ours: str, peer: str) -> tuple[float, float, float]:
    """Median, least and largest of peer / ours over the steps in their order."""
    pairs = [b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def matmul_flops(device: str, dtype: torch.dtype, *, seconds: float = 1.5) -> float:
    """Floating-point operations per second of a large matrix product, measured now."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        _wait()
        start = time.perf_counter()
        a @ b
        _wait()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def step_flops(rows: Sequence[Row], size: str, vocabulary: int) -> float:
    """Model FLOPs of one forward and backward with each prompt once: 6 per weight and token.

    The head counts for response tokens alone; attention scores are left out, as is usual.
    """
    shape = SIZES[size]
    hidden = shape["hidden"]
    kv = shape["kv_heads"] / shape["heads"]
    body = shape["layers"] * (hidden * hidden * (2 + 2 * kv) + 3 * hidden * shape["inner"])
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


def scratch() -> str:
    """A folder that trainers may write to."""
    return tempfile.mkdtemp(prefix="bench-")
