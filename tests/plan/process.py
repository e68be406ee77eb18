"""A process that trains two steps, for comparison with its plan.

    python -m tests.plan.process SETTINGS

SETTINGS is JSON; see `SETTINGS`. With an engine it is one rank of two. It prints `held N of M`: its peak in
bytes beyond what it held once all libraries were loaded, and its total peak.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from typing import Any

SETTINGS: dict[str, Any] = {
    "kind": "dpo", "accumulation": 1, "checkpointing": False, "bf16": False, "lora": None,
    "nf4": False, "frozen": False, "engine": "single", "folder": "", "micro_batch": 4,
}  # fmt: skip
RANKS = 2


def ranks_of(settings: dict[str, Any]) -> int:
    return 1 if settings["engine"] == "single" else RANKS


def rows_of(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One optimizer step on rows of equal lengths."""
    ids = list(range(2, 102))
    return [
        {"id": str(i), "source": "x", "prompt_ids": ids * 2, "response_ids": [ids, ids],
         "response_mask": [[1] * 100] * 2, "rewards": [1.0, 0.0]}
        for i in range(settings["micro_batch"] * settings["accumulation"] * ranks_of(settings))
    ]  # fmt: skip


def model_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=16000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip


def adapter(settings: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(**settings["lora"]) if settings["lora"] else None


def planned(settings: dict[str, Any]) -> int:
    """Return the bytes of one rank's peak, without libraries and Python's own objects."""
    import torch
    from transformers import AutoModelForCausalLM

    from rpo_trainer.models.adapters import with_adapter
    from rpo_trainer.models.reward_model import as_reward_model
    from rpo_trainer.plan import per_device, step_memory
    from rpo_trainer.plan.nf4 import hold_in_nf4

    rows, half = rows_of(settings), torch.bfloat16 if settings["bf16"] else None
    engine = settings["engine"]

    def make(dtype: torch.dtype) -> Any:
        model: Any = AutoModelForCausalLM.from_config(model_config(), dtype=dtype)
        if settings["kind"] == "reward":
            model = as_reward_model(model)
        if settings["lora"]:
            model = with_adapter(model, adapter(settings))
        if settings["nf4"]:
            hold_in_nf4(model, half or torch.float32)
        return model

    memory = step_memory(
        make, rows[: settings["micro_batch"]], reference_batch=rows if settings["kind"] == "dpo" else (),
        accumulation=settings["accumulation"], checkpointing=settings["checkpointing"],
        autocast=half, frozen=half if settings["frozen"] and half else torch.float32,
        half_weights=bool(half) and engine in ("fsdp2", "zero3"),
    )  # fmt: skip
    return per_device(memory, engine, ranks_of(settings), half=bool(half)).peak


def train(settings: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from rpo_trainer import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
    from rpo_trainer.data.quickstart import character_tokenizer
    from rpo_trainer.models.quantization import nf4
    from tests.distributed.worker import engine_settings

    reward, engine = settings["kind"] == "reward", settings["engine"]
    config: Any = RewardConfig if reward else DPOConfig
    args = config(
        output_dir=tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["accumulation"], bf16=settings["bf16"],
        activation_checkpointing=settings["checkpointing"], optim="adamw_torch",
        save_strategy="no", report_to="none", disable_tqdm=True,
        **engine_settings("none" if engine == "single" else engine),
    )  # fmt: skip
    held = {}
    if settings["nf4"]:
        held["quantization_config"] = nf4(torch.bfloat16 if args.bf16 else torch.float32)
    trainer: Any = RewardTrainer if reward else DPOTrainer
    dtype = "bfloat16" if settings["frozen"] else "float32"  # below an adapter
    model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=dtype, **held)
    for tensor in model.parameters() if held else ():  # otherwise the quantized file stays mapped
        tensor.data = tensor.data.clone()
    trainer(
        model=model,
        args=args,
        train_dataset=rows_of(settings),
        processing_class=character_tokenizer(),
        peft_config=adapter(settings),
    ).train()


def main(text: str) -> None:
    if "WORLD_SIZE" in os.environ:
        from tests.distributed import gloo

        gloo.allow()
    import psutil
    import torch._dynamo

    from rpo_trainer.runtime import distributed
    from rpo_trainer.runtime.memory import peak_memory

    for library in (
        "rpo_trainer.trainers", "deepspeed", "peft", "torch.distributed.fsdp", "bitsandbytes",
        "transformers.integrations.bitsandbytes", "transformers.models.llama.modeling_llama",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            __import__(library)
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    train({**SETTINGS, **json.loads(text)})
    sys.stdout.flush()
    # In one write, because two ranks write to the same file.
    os.write(1, f"\nheld {peak_memory() - before} of {peak_memory()}\n".encode())
    distributed.end()


if __name__ == "__main__":
    main(sys.argv[1])
