"""A process that benchmarks/data.py measures: starts a training, reports and ends at its first step.

    run RECIPE RUN_DIR               `rpo-trainer run`
    ours|trl KIND MODEL ROWS OUTPUT  the trainer of the library on a data set of `datasets`
    tokenizer MODEL ROWS             the tokenizer alone, in batches of 1,000 texts

With BENCH_DATA_PRELOAD the modules named in that file are imported first, so that their time is known apart.

The report is `rank-N.json` in the log directory: CPU seconds of the process, of children it has waited for
and of those that are alive, since the start; memory at the first step; the names of the loaded modules.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

LOG = Path(os.environ["BENCH_DATA_LOG"])
RANK = os.environ.get("RANK", "0")


def main(mode: str, *arguments: str) -> None:
    """Run one of the modes."""
    (LOG / f"rank-{RANK}.pid").write_text(str(os.getpid()))
    marks = _preload()
    if mode == "tokenizer":
        _tokenizer(Path(arguments[0]), Path(arguments[1]))
    else:
        _report_first_step(marks)
        if mode != "trl":
            _skip_reference_forwards()
        if mode == "run":
            _run(*arguments)
        else:
            _train(mode, *arguments)


def cpu_seconds() -> float:
    """Return user and system seconds of this process, children it has waited for, and living descendants."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) + _living_seconds()


def _living_seconds() -> float:
    import psutil

    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _write(**figures: Any) -> None:
    (LOG / f"rank-{RANK}.json").write_text(json.dumps(figures))


def _preload() -> dict[str, float]:
    """Import the modules that an earlier start had loaded; return the CPU time until then."""
    if "BENCH_DATA_PRELOAD" not in os.environ:
        return {}
    for name in json.loads(Path(os.environ["BENCH_DATA_PRELOAD"]).read_text()):
        try:
            importlib.import_module(name)
        except Exception:  # made at run time, not importable
            continue
    return {"imported": cpu_seconds()}


def _tokenizer(model: Path, rows: Path) -> None:
    from data_rows import texts_of
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with rows.open(encoding="utf-8") as file:
        texts = [text for line in file for text in texts_of(json.loads(line))]
    before = cpu_seconds()
    tokens = 0
    for start in range(0, len(texts), 1000):
        encoded = tokenizer(texts[start : start + 1000], add_special_tokens=False)
        tokens += sum(map(len, encoded["input_ids"]))
    _write(cpu=cpu_seconds() - before, tokens=tokens)


def _report_first_step(marks: dict[str, float]) -> None:
    """Add a callback to all trainers of transformers, which reports and ends the process."""
    import transformers.trainer
    from transformers import TrainerCallback

    class FirstStep(TrainerCallback):  # type: ignore[misc]
        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            marks["constructed"] = cpu_seconds()

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            marks["train_begins"] = cpu_seconds()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if "BENCH_DATA_TO_END" not in os.environ:
                _end({**marks, "first_step": cpu_seconds()})

    transformers.trainer.DEFAULT_CALLBACKS.append(FirstStep)


def _skip_reference_forwards() -> None:
    """Replace the forward passes for reference log-probs by zeros.

    They cover all rows before the first step, and would hide the work on data. TRL has none before its first
    step. The rest of the pass over the rows remains: lengths, packing, keys, cache.
    """
    import torch

    from rpo_trainer.step import reference

    if not hasattr(reference, "token_logprobs"):
        raise SystemExit("rpo_trainer.step.reference has no token_logprobs to replace")
    reference.token_logprobs = lambda model, inputs: torch.zeros(len(inputs.labels))


def _end(marks: dict[str, float]) -> None:
    import psutil
    import torch

    ranks = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if ranks:
        torch.distributed.barrier()
    _write(
        cpu=marks["first_step"],
        marks=marks,
        memory=_memory(),
        modules=[name for name in sys.modules if not name.startswith("__")],
    )
    if ranks:
        torch.distributed.barrier()  # so that all have measured while all are alive
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(0)


def _memory() -> dict[str, int]:
    """Return the fields of smaps_rollup, and resident mapped files below the working directory, in bytes."""
    from data_measure import rollup

    found = rollup(os.getpid())
    own, found["DataMapped"] = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            own = len(rest) > 4 and rest[4].startswith(f"{Path.cwd()}/")
        elif own and first == "Rss:":
            found["DataMapped"] += int(rest[0]) * 1024
    return found


def _run(recipe: str, run_dir: str) -> None:
    from rpo_trainer.cli import main as program

    sys.argv = ["rpo-trainer", "run", recipe, "--run-dir", run_dir]
    sys.exit(program())


def _train(library: str, kind: str, model: str, rows: str, output: str) -> None:
    from data_rows import MAX_LENGTH
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"pair": "DPO", "sft": "SFT", "k4": "RPO"}
    module = importlib.import_module("rpo_trainer" if library == "ours" else "trl")
    config = getattr(module, f"{names[kind]}Config")
    # The reference log-probs are zeros, see above.
    settings: dict[str, Any] = {} if kind == "sft" else {"step0_check": False}
    if library == "trl":
        settings = {"gradient_checkpointing": False}
        if kind == "sft":
            settings["assistant_only_loss"] = True
    trainer = getattr(module, f"{names[kind]}Trainer")(
        AutoModelForCausalLM.from_pretrained(model),
        args=config(
            output_dir=output,
            max_length=MAX_LENGTH,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-6,
            num_train_epochs=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **settings,
        ),
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
