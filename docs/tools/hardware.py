"""Writes docs/hardware.md: peak memory per device for common model sizes, as `rpo-trainer plan` estimates it.

python docs/tools/hardware.py            # print the page
python docs/tools/hardware.py --write    # write it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "hardware.md"
GIB = 2**30


def _llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int, tied: bool) -> Any:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary,
        "num_key_value_heads": 3 if heads == 9 else 8, "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
    }  # fmt: skip


SHAPES: dict[str, Any] = {
    "135 M (SmolLM2-135M)": _llama(576, 1536, 30, 9, 49152, True),
    "1.2 B (Llama-3.2-1B)": _llama(2048, 8192, 16, 32, 128256, True),
    "8 B (Llama-3.1-8B)": _llama(4096, 14336, 32, 32, 128256, False),
    "70 B (Llama-3.1-70B)": _llama(8192, 28672, 80, 64, 128256, False),
}
_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# Column → adapter, engine, devices.
COLUMNS: dict[str, tuple[Any, str, int]] = {
    "QLoRA, 1 GPU": ({**_LORA, "quantization": "nf4", "between_stages": "keep"}, "single", 1),
    "LoRA, 1 GPU": (_LORA, "single", 1),
    "LoRA, FSDP2 on 8": (_LORA, "fsdp2", 8),
    "all weights, 1 GPU": (None, "single", 1),
    "all weights, FSDP2 on 8": (None, "fsdp2", 8),
    "all weights, ZeRO-3 on 8": (None, "zero3", 8),
}
HEAD = """# Hardware: what fits where

**Computed by `rpo-trainer plan`, not measured.** [Memory](scale.md) compares estimates with
measurements.

Peak memory of each device in GiB, for DPO or RPO on one pair per micro-batch: a prompt of 1,024 tokens
with two responses of 512, bfloat16 computation, AdamW, gradient checkpointing, LoRA of rank 16 on all
linear layers. The CUDA context, the libraries and freed memory that the allocator keeps (a few GiB
together) come on top.

"""
TAIL = """
For your own recipe, data and model:

    rpo-trainer plan RECIPE

`--engine` and `--devices` distribute the model, `--measure` times a step on the device at hand. If a
case does not fit, [reduce memory](scale.md#reduce-memory) lists the settings that help.

This page is generated: `python docs/tools/hardware.py --write`.
"""


def peak(shape: Any, adapter: Any, engine: Any, devices: int, folder: Path) -> float:
    """GiB on each device."""
    from rpo_trainer.plan import plan_recipe
    from rpo_trainer.recipe import load_recipe

    prompt, response = "x" * 1000, "y" * 510  # one token per character, and the template's
    row = {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": response}],
        "rejected": [{"role": "assistant", "content": response[:-1] + "z"}],
    }
    rows = [{**row, "id": str(number)} for number in range(64)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "name": "dpo", "kind": "dpo", "beta": 0.1, "learning_rate": 1e-6, "max_length": 2048,
        "global_batch_size": 64, "gradient_checkpointing": True,
        "data": {"train": [{"path": "pairs.jsonl"}]},
    }  # fmt: skip
    if adapter is not None:
        stage["peft"] = adapter
    recipe = {
        "model": {
            "name_or_path": "./model", "tokenizer": "characters", "chat_template": "plain",
            "dtype": "bfloat16",
        },
        "stages": [stage],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    _save_model_without_weights(shape, folder / "model")
    plan = plan_recipe(
        load_recipe(folder / "recipe.yaml"), folder / "run", engine=engine, devices=devices, nodes=1,
        measure=False, arguments=[],
    )  # fmt: skip
    return plan.stages[0].memory.peak / GIB


def _save_model_without_weights(shape: Any, folder: Path) -> None:
    """A directory with a config: planning reads no weights."""
    from transformers import AutoConfig

    AutoConfig.for_model(**shape).save_pretrained(folder)


def row_of(name: str) -> str:
    """A row of the table."""
    cells = []
    for adapter, engine, devices in COLUMNS.values():
        with tempfile.TemporaryDirectory() as folder:
            found = peak(SHAPES[name], adapter, engine, devices, Path(folder))
        cells.append(f"{found:.1f}" if found < 100 else f"{found:.0f}")
    return f"| {name} | {' | '.join(cells)} |"


def page(rows: Sequence[str]) -> str:
    """The whole page."""
    header = f"| model | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}\n"
    return HEAD + header + "".join(f"{row}\n" for row in rows) + TAIL


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/hardware.md")
    write = parser.parse_args().write
    with contextlib.redirect_stdout(None):
        text = page([row_of(name) for name in SHAPES])
    if write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
