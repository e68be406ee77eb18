"""Compares sampling K responses per prompt with transformers, alternating in one process.

    python benchmarks/sample.py                                    # 42 M parameters, K = 4, geometric lengths
    python benchmarks/sample.py --k 4 8 --prompt 256 1024
    python benchmarks/sample.py --lengths benchmarks/ultrafeedback.csv --max-new-tokens 512
    python benchmarks/sample.py --model FOLDER --dtype bfloat16    # a pretrained model
    python benchmarks/sample.py --peers                            # without peers

`generate` is transformers' `generate` with `num_return_sequences`, on batches of prompts of similar length;
`generate_batch` is its continuous batching, which prefills each prompt once. All sample at temperature 1
from the whole vocabulary, at most `--batch` responses at a time. A random model ends its responses with
lengths that are encoded in its weights (see lengths.py), the same for all engines. On a GPU, the memory
bandwidth limit is printed too: a decode step reads all weights and the cache, and cannot be faster than
that.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from common import DEVICE, SIZES, lengths_of, make_model, make_tokenizer, quiet, wait
from lengths import empirical, geometric, give_lengths, prompt_words

from rpo_trainer.data import encode_prompt
from rpo_trainer.rewards.sample import sample_responses

_WORDS = ("river", "stone", "garden", "clock", "letter", "winter", "engine", "mirror", "island")
_WARM_UP = 8  # tokens
_PATIENCE = (
    30 if DEVICE == "cuda" else 300
)  # maximum seconds between two responses of continuous batching


@dataclass
class Work:
    """The input of every engine: one model, the same prompts, the same limits."""

    model: Any
    tokenizer: Any
    prompts: list[Any]
    ids: list[list[int]]
    ends: list[int]
    k: int
    batch: int
    longest: int

    def config(self, longest: int) -> Any:
        """Return the generation config for the engines of transformers."""
        from transformers import GenerationConfig

        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=longest, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=self.k, eos_token_id=self.ends,
            pad_token_id=self.ends[0] if pad is None else pad,
        )  # fmt: skip

    def length(self, tokens: Sequence[int]) -> int:
        """Return the number of tokens of a response, including its end token."""
        return next((n for n, token in enumerate(tokens, 1) if token in self.ends), len(tokens))


Engine = Callable[[Work, int], list[int]]  # (work, maximum new tokens) → length of each response


def ours(work: Work, longest: int) -> list[int]:
    """Sample with rpo-trainer, from text to text."""
    found = sample_responses(
        work.model, work.tokenizer, work.prompts, responses=work.k, max_new_tokens=longest,
        batch_size=work.batch,
    )  # fmt: skip
    samples = list(itertools.chain(*found))
    texts = work.tokenizer([sample.text for sample in samples], add_special_tokens=False)
    return [
        len(ids) + sample.finished for ids, sample in zip(texts["input_ids"], samples, strict=True)
    ]


def generate(work: Work, longest: int) -> list[int]:
    """Sample with `generate`: padded batches of prompts of similar length, longest first."""
    order = sorted(work.ids, key=len, reverse=True)
    each, config, found = max(1, work.batch // work.k), work.config(longest), []
    for start in range(0, len(order), each):
        rows = order[start : start + each]
        width = len(rows[0])
        ids = [[config.pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        with torch.no_grad():
            out = work.model.generate(
                input_ids=torch.tensor(ids, device=DEVICE),
                attention_mask=torch.tensor(mask, device=DEVICE),
                generation_config=config,
            )
        found += [work.length(row) for row in out[:, width:].tolist()]
    return found


def generate_batch(work: Work, longest: int) -> list[int]:
    """Sample with continuous batching; the manager is kept, so that only the first call starts it.

    This replaces the model's `generate_batch`, which in transformers 5.17 returns one response per prompt.
    The cache has room for the batch only; by default, it takes most of the memory.

    Raises:
        RuntimeError: if some responses are missing.
    """
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    wanted, found = len(work.ids) * work.k, []
    width = max(map(len, work.ids))
    with work.model.continuous_batching_context_manager(
        generation_config=work.config(work.longest),
        continuous_batching_config=ContinuousBatchingConfig(
            max_requests_per_batch=work.batch, **_cache_size(work)
        ),
        persistent_manager=True,
        timeout=5,
        workload_hints=WorkloadHints(
            max_prompt_length=width, max_generated_length=work.longest, num_requests=wanted
        ),
    ) as manager:
        manager.add_requests(inputs=work.ids, max_new_tokens=longest)
        last = time.perf_counter()
        while len(found) < wanted:
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running() or time.perf_counter() - last > _PATIENCE:
                    raise RuntimeError(
                        f"continuous batching stopped after {len(found)} of {wanted} responses"
                    )
            elif output.error:
                raise RuntimeError(output.error)
            elif output.is_finished():
                found.append(work.length(output.generated_tokens))
                last = time.perf_counter()
    return found


def _cache_size(work: Work) -> dict[str, int]:
    """Return a cache size with room for the batch, and for a prefill of up to 4,096 tokens on a GPU."""
    block, width = 256, max(map(len, work.ids))
    blocks = work.batch * (-(-(width + work.longest) // block) + 1)
    tokens = max(4096 if DEVICE == "cuda" else 1024, width)
    return {"block_size": block, "num_blocks": blocks, "max_batch_tokens": tokens}


PEERS: dict[str, Engine] = {"generate": generate, "generate_batch": generate_batch}


@dataclass
class Case:
    """Prompt lengths, K, and the distribution of response lengths."""

    name: str
    k: int
    prompts: list[int]
    shares: list[float]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", default="42m", choices=SIZES, help="model size")
    parser.add_argument("--vocabulary", type=int, help="vocabulary size; default: that of --size")
    parser.add_argument(
        "--model", type=Path, help="model directory, instead of --size and --vocabulary"
    )
    parser.add_argument("--dtype", default="float32", help="dtype of the weights")
    parser.add_argument("--k", type=int, nargs="+", default=[4], help="responses per prompt")
    parser.add_argument("--prompts", type=int, default=32, help="number of prompts")
    parser.add_argument("--prompt", type=int, nargs="+", default=[256], help="tokens per prompt")
    parser.add_argument(
        "--mean", type=float, default=44.0, help="mean of the geometric response lengths"
    )
    parser.add_argument("--lengths", type=Path, help="CSV or JSONL of real pairs; see common.py")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument(
        "--batch", type=int, default=64, help="maximum number of responses at a time"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the result to FILE as one line"
    )
    args = parser.parse_args()
    args.vocabulary = args.vocabulary or SIZES[args.size].vocabulary
    return args


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Return a case for each K and prompt length; with `--lengths`, one for each K."""
    if args.lengths:
        found = lengths_of(args.lengths, args.prompts, 2)
        rest = [n for _, lengths in found for n in lengths]
        prompts, shares = [prompt for prompt, _ in found], empirical(rest, args.max_new_tokens)
        return [Case(f"K {k}, lengths of {args.lengths.name}", k, prompts, shares) for k in args.k]
    shares = geometric(args.mean, args.max_new_tokens)
    return [
        Case(f"K {k}, prompts of {n}", k, [n] * args.prompts, shares)
        for n in args.prompt
        for k in args.k
    ]


def load(args: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    """Load the model and the tokenizer; return them and the end tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if args.model is None:
        model, tokenizer = (
            make_model(args.size, args.vocabulary, dtype=args.dtype),
            make_tokenizer(args.vocabulary),
        )
    else:
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_pretrained(
                args.model, dtype=getattr(torch, args.dtype)
            ).to(DEVICE)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    ends = sorted({n for n in (*listed, tokenizer.eos_token_id) if n is not None})
    # Decoding settings of a checkpoint would affect only some engines.
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return model.eval(), tokenizer, ends


def prompt_of(args: argparse.Namespace, tokenizer: Any, length: int, rng: random.Random) -> Any:
    """Return a text of exactly `length` tokens; for a pretrained model, a request of about that length."""
    if args.model is None:
        words = prompt_words(args.vocabulary)
        return " ".join(f"w{rng.choice(words)}" for _ in range(length))
    request = [{"role": "user", "content": "Write a short story with these words:"}]
    bare = len(encode_prompt(tokenizer, request))
    named = " ".join(rng.choice(_WORDS) for _ in range(max(3, length - bare)))
    return [{"role": "user", "content": f"{request[0]['content']} {named}"}]


def main() -> None:
    """Print a line for each case and engine, and on a GPU the memory bandwidth limit."""
    args = arguments()
    model, tokenizer, ends = load(args)
    speed = memory_speed() if DEVICE == "cuda" else None
    results = []
    for case in cases_of(args):
        if args.model is None:
            with quiet():
                model = make_model(args.size, args.vocabulary, dtype=args.dtype).eval()
            give_lengths(model, case.shares)
        rng = random.Random(0)
        prompts = [prompt_of(args, tokenizer, n, rng) for n in case.prompts]
        ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        work = Work(model, tokenizer, prompts, ids, ends, case.k, args.batch, args.max_new_tokens)
        results.append(compare(case, work, args, speed))
    record.append(args, memory_speed=speed, cases=results)


def compare(
    case: Case, work: Work, args: argparse.Namespace, speed: float | None
) -> dict[str, Any]:
    """Run all engines in turn, and print each time at once; print and return the results."""
    engines: dict[str, Engine] = {"ours": ours, **{name: PEERS[name] for name in args.peers}}
    skipped: dict[str, str] = {}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    lengths: dict[str, list[int]] = {name: [] for name in engines}
    print(f"{case.name}, batch {work.batch}, at most {work.longest} new tokens", flush=True)
    for turn in range(args.rounds + 1):
        for name, engine in engines.items():
            if name in skipped:
                continue
            wait()
            start = time.perf_counter()
            try:
                with quiet():
                    found = engine(work, work.longest if turn else _WARM_UP)
            except Exception as error:
                if name == "ours":
                    raise
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                skipped[name] = f"{type(error).__name__}: {first[:300]}"
                print(f"  {name:14} skipped: {skipped[name]}", flush=True)
                continue
            wait()
            seconds = time.perf_counter() - start
            print(
                f"  {name:14} {f'round {turn}' if turn else 'warm-up'}: "
                f"{sum(found):,} tokens in {seconds:.1f} s",
                flush=True,
            )
            if turn:
                rates[name].append(sum(found) / seconds)
                lengths[name] += found
    with contextlib.suppress(AttributeError):
        work.model.destroy_cached_continuous_batching_manager()
    ran = [name for name in engines if name not in skipped]
    mean = {name: statistics.mean(lengths[name]) for name in ran}
    # Our rate divided by the peer's
    ratios = {name: record.spread(rates[name], rates["ours"]) for name in ran if name != "ours"}
    most = limit(work, mean["ours"], speed) if speed else None
    for name in ran:
        print(
            f"  {name:14} {statistics.median(rates[name]):10,.0f} tokens/s   mean length {mean[name]:6.1f}"
            + (f"   {statistics.median(rates[name]) / most:5.1%} of the limit" if most else "")
            + ("   ours {:.2f} × as fast ({:.2f} to {:.2f})".format(*ratios[name]) if name in ratios else "")
        )  # fmt: skip
    if most and speed:
        print(f"  memory bandwidth limit {most:9,.0f} tokens/s, at {speed / 1e9:,.0f} GB/s")
    return {
        "case": case.name, "k": case.k, "skipped": skipped, "rates": {n: rates[n] for n in ran},
        "ratios": ratios, "mean_length": mean, "limit": most,
    }  # fmt: skip


def memory_speed() -> float:
    """Measure the bytes per second that a large copy reads and writes."""
    size = 2 * 2**30
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target, best = torch.empty_like(source), 0.0
    for _ in range(8):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def limit(work: Work, mean: float, speed: float) -> float:
    """Return the tokens per second if a decode step of a full batch took only as long as its memory reads.

    It reads all weights except the embedding table, and the keys and values of all tokens so far.
    """
    model, config = work.model, work.model.config.get_text_config()
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if table is not head:
        weights -= table.numel() * table.element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * size * table.element_size()
    rows = min(work.batch, len(work.ids) * work.k)
    context = statistics.mean(map(len, work.ids)) + mean / 2
    return rows * speed / (weights + rows * context * token)


if __name__ == "__main__":
    main()
