"""The hardware and software that a stage trains on, as the report shows them."""

from __future__ import annotations

import os
import platform
from collections import Counter

import torch

from rpo_trainer.chain.state import library_versions
from rpo_trainer.runtime import distributed
from rpo_trainer.runtime.cores import usable_cores
from rpo_trainer.stages.record import SystemRecord
from rpo_trainer.trainers.base import BaseTrainer


def system_record(trainer: BaseTrainer, precision: str) -> SystemRecord:
    """Describe devices, launcher and versions; all processes must call it.

    Args:
        precision: dtype of the arithmetic.
    """
    devices = distributed.all_gather_dict({distributed.rank(): _device()})
    return SystemRecord(
        devices=dict(sorted(Counter(devices.values()).items())),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=_memory(),
        platform=f"{platform.system()} {platform.machine()}",
        launcher=_launcher(),
        engine=trainer.accelerator.distributed_type.value,
        world_size=distributed.world_size(),
        precision=precision,
        libraries={"python": platform.python_version(), **library_versions()},
    )


def _device() -> str:
    device = distributed.device()
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return device.type.upper()


def _memory() -> int | None:
    """Return the memory of this host in bytes, or None if the platform does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _launcher() -> str:
    """Return the launcher of this process, from the environment variables that launchers set."""
    variables = os.environ
    if "ACCELERATE_MIXED_PRECISION" in variables:
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in variables:
        return "torchrun"
    if "SLURM_PROCID" in variables and distributed.world_size() > 1:
        return "srun"
    if "OMPI_COMM_WORLD_RANK" in variables:
        return "mpirun"
    return "rpo-trainer" if distributed.world_size() == 1 else "another launcher"
