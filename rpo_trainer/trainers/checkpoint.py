"""Atomic checkpoints: written to a staging directory, then a manifest with hashes, then renamed.

A trainer has one `Checkpoints`, which stages checkpoints and finds the one to resume from.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from rpo_trainer.errors import RunError, StoppedBySignal
from rpo_trainer.runtime.distributed import ALL_RANKS, on_main, raise_on_all_ranks
from rpo_trainer.runtime.ranks import ALONE, Ranks
from rpo_trainer.trainers.background_save import BackgroundSave
from rpo_trainer.trainers.engine import check_same_engine
from rpo_trainer.trainers.manifest import MANIFEST, verify_manifest, write_manifest

logger = logging.getLogger(__name__)

STAGING = ".staging"
# Of a single process or DDP, of FSDP2, of DeepSpeed
_OPTIMIZER = re.compile(r"^(optimizer\.pt|optimizer\.bin|optimizer_\d+|global_step\d+)$")
_RNG = re.compile(r"^rng_state(_\d+)?\.pth$")
_NAME = re.compile(r"^checkpoint-(\d+)$")


class Checkpoints:
    """Writes the checkpoints of a trainer, and finds the one to resume from.

    Attributes:
        staging: the directory that a checkpoint is being written to; None: no checkpoint is being written.
    """

    def __init__(self, args: TrainingArguments, accelerator: Accelerator) -> None:
        self.args = args
        self.accelerator = accelerator
        self.staging: Path | None = None
        self.background = BackgroundSave() if getattr(args, "async_save", False) else None

    @contextmanager
    def staged(self, output: Path, state: TrainerState) -> Iterator[None]:
        """Write a checkpoint to `staging` inside this context, and move it to `output` when complete.

        With `async_save`, its large files are written after the context, while training continues.
        """
        self.finish()
        name = f"checkpoint-{state.global_step}"
        staging = output / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.staging = staging
        try:
            with nullcontext() if self.background is None else self.background.deferred():
                yield
        finally:
            self.staging = None
        self.accelerator.wait_for_everyone()
        # transformers checks whether the directory exists, which is a race between ranks; but at the end all
        # ranks must load the best model from it.
        is_best = state.best_global_step == state.global_step
        if is_best:
            state.best_model_checkpoint = str(output / name)
        if self.args.should_save and is_best:
            state.save_to_json(str(staging / name / "trainer_state.json"))
        best = state.best_model_checkpoint
        if self.background is not None:
            if self.args.should_save:
                self.background.start(
                    output / name,
                    lambda: self._complete(staging / name, output / name, best, ALONE),
                )
            return
        # With save_on_each_node, a rank of each host writes a checkpoint of its own.
        alone = self.args.save_on_each_node
        if self.args.should_save or not alone:
            self._complete(staging / name, output / name, best, ALONE if alone else ALL_RANKS)
        self.accelerator.wait_for_everyone()

    def _complete(self, staged: Path, final: Path, best: str | None, ranks: Ranks) -> None:
        """Commit a checkpoint, and remove old ones; `ranks` hash its files."""
        commit(staged, final, ranks)
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
            rotate(final.parent, self.args.save_total_limit, best)

    def finish(self) -> None:
        """Wait for a checkpoint that is written while training continues; called on all ranks.

        Raises:
            RunError: it could not be written.
        """
        if self.background is not None:
            with raise_on_all_ranks():
                self.background.finish()

    @contextmanager
    def kept_on_errors(self) -> Iterator[None]:
        """If an error ends training inside this context, complete the checkpoint that is being written.

        It is abandoned if the process is to stop immediately.
        """
        try:
            yield
        except BaseException as error:
            if self.background is not None:
                at_once = isinstance(error, StoppedBySignal) or not isinstance(error, Exception)
                self.background.stop(abandon=at_once)
            raise

    def to_resume(self, wanted: str | bool | None) -> str | None:
        """Return the checkpoint for `train(resume_from_checkpoint=wanted)`; None to start from scratch.

        Args:
            wanted: a directory, or whether to resume from the newest complete checkpoint (a bool, or a string
                from a command line).

        Raises:
            RunError: there is none, it is damaged or lacks state, or another engine wrote it.
        """
        if isinstance(wanted, str) and wanted.lower() in ("true", "false"):
            wanted = wanted.lower() == "true"
        if not wanted:
            return None
        if wanted is True:
            output = Path(str(self.args.output_dir))
            found = on_main(lambda: last_complete(output))
            if found is None:
                raise RunError(
                    "there is no complete checkpoint to resume from",
                    code="run.no-complete-checkpoint",
                    where=self.args.output_dir,
                    why="checkpoints with missing or changed files are not used",
                    fix="remove resume_from_checkpoint to start from scratch, or set another output_dir",
                )
        else:
            found = folder = Path(str(wanted))
            on_main(lambda: require_complete(folder))
        refuse_pickles(found)
        check_same_engine(found, self.accelerator)
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        own_scheduler = deepspeed is None or "scheduler" not in deepspeed.deepspeed_config
        on_main(
            lambda: require_state(
                found,
                scaler=self.accelerator.scaler is not None,
                own_scheduler=own_scheduler,
                ranks=self.args.world_size,
            )
        )
        return str(found)


@contextmanager
def keep_hyperparameters_on_load(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Keep learning rate, betas and weight decay of the config when a checkpoint is loaded inside.

    Otherwise the values in the checkpoint would replace them.
    """
    before = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    rates = list(getattr(inner, "base_lrs", ()))
    yield
    for group, own in zip(optimizer.param_groups, before, strict=True):
        group.update(own)
    if rates and hasattr(inner, "lr_lambdas"):
        inner.base_lrs = rates
        factors = [factor(inner.last_epoch) for factor in inner.lr_lambdas]
        inner._last_lr = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
        for group, rate in zip(optimizer.param_groups, inner._last_lr, strict=True):
            group["lr"] = rate


def load_into_wrapped(trainer: Any, folder: str) -> None:
    """Load a checkpoint into a trainer whose model is wrapped by an engine."""
    with keep_hyperparameters_on_load(trainer.optimizer, trainer.lr_scheduler):
        if trainer.engine.uses_deepspeed:
            deepspeed_load_checkpoint(  # type: ignore[no-untyped-call]
                trainer.model_wrapped,
                folder,
                load_module_strict=not hasattr(trainer.model, "peft_config"),
            )
        else:
            trainer._load_from_checkpoint(folder, trainer.model_wrapped)
        trainer._load_optimizer_and_scheduler(folder)
        trainer._load_scaler(folder)


def commit(staged: Path, final: Path, ranks: Ranks = ALONE) -> None:
    """Turn a staged directory into a complete checkpoint at `final`.

    Args:
        ranks: the processes that hash its files; all of them call this.
    """
    write_manifest(staged, ranks)

    def move() -> None:
        if final.exists():
            shutil.rmtree(final)
        os.replace(staged, final)

    ranks.on_main(move)


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint directories, newest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _NAME.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def last_complete(output_dir: Path, *, content: bool = False) -> Path | None:
    """Return the newest checkpoint that matches its manifest; damaged ones are skipped with a WARNING.

    Args:
        content: see `verify_manifest`.
    """
    for path in checkpoints(output_dir):
        fault = verify_manifest(path, content=content)
        if fault is None:
            return path
        logger.warning("checkpoint %s is damaged (%s): using the previous one", path, fault)
    return None


def require_complete(folder: Path) -> None:
    """Raise RunError if there is no checkpoint, or it does not match its manifest."""
    if not folder.is_dir():
        raise RunError(
            "there is no such checkpoint directory",
            code="run.no-such-checkpoint",
            where=str(folder),
            fix="use the directory of a checkpoint, or True for the newest one in output_dir",
        )
    if (folder / MANIFEST).is_file() and (fault := verify_manifest(folder)) is not None:
        raise RunError(
            f"the checkpoint is damaged: {fault}",
            code="run.damaged-checkpoint",
            where=str(folder),
            why="the resumed run would differ from the stopped run",
            fix="resume from an earlier checkpoint (resume_from_checkpoint=True finds one)",
        )


def refuse_pickles(folder: Path) -> None:
    """Raise RunError if the weights of a checkpoint are pickled: loading a pickle can run code.

    accelerate's file for FSDP (pytorch_model_fsdp*.bin) is loaded with `weights_only=True`.
    """
    found = [*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model*.bin")]
    pickled = [path for path in found if not path.name.startswith("pytorch_model_fsdp")]
    if pickled and not any(folder.glob("*.safetensors")):
        raise RunError(
            f"the weights of the checkpoint are pickled ({pickled[0].name})",
            code="run.pickled-weights",
            where=str(folder),
            why="loading a pickle can run code",
            fix="if you trust its origin, convert it: load it with transformers, then save_pretrained",
        )


def require_state(folder: Path, *, scaler: bool, own_scheduler: bool, ranks: int) -> None:
    """Raise RunError if a checkpoint lacks state that an exact resume needs.

    transformers would continue with a new optimizer, schedule or RNG state.

    Args:
        scaler: whether the run scales its losses (float16).
        own_scheduler: whether the schedule has its own file; DeepSpeed may save it with the optimizer.
        ranks: number of processes.
    """
    present = {path.name for path in folder.iterdir()}
    missing: dict[str, str] = {}
    if "trainer_state.json" not in present:
        missing["trainer"] = "the state of the trainer"
    if not any(_OPTIMIZER.match(name) for name in present):
        missing["optimizer"] = "the state of the optimizer"
    if own_scheduler and "scheduler.pt" not in present:
        missing["scheduler"] = "the state of the learning rate schedule"
    if scaler and "scaler.pt" not in present:
        missing["scaler"] = "the scale of float16 losses"
    if not any(_RNG.match(name) for name in present):
        missing["rng"] = "the RNG state"
    if missing:
        raise RunError(
            f"the checkpoint lacks {', '.join(missing.values())}",
            code="run.incomplete-checkpoint",
            details={"missing": list(missing)},
            where=str(folder),
            why="training would resume with new state (save_only_model writes such checkpoints)",
            fix="start a new run from its weights (from_pretrained), or resume from a full checkpoint",
        )
    wanted = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{r}.pth" for r in range(ranks)]
    if not present.issuperset(wanted):
        logger.warning(
            "the checkpoint %s was written by a different number of processes: dropout and other noise will "
            "differ", folder,
        )  # fmt: skip


def rotate(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, but neither the newest nor the one at `keep`."""
    if not limit or limit < 1:
        return
    found = checkpoints(output_dir)
    kept = {path.name for path in found[:1]}
    if keep and (output_dir / Path(keep).name) in found:
        kept.add(Path(keep).name)
    others = [path for path in found if path.name not in kept]
    for path in others[max(0, limit - len(kept)) :]:
        shutil.rmtree(path, ignore_errors=True)
