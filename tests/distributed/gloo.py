"""Lets every engine start on a machine without a GPU; for tests only.

accelerate determines the world size from the available devices: without a GPU, DeepSpeed and FSDP ranks would
be separate runs. Here they communicate over gloo, and the device is the CPU.
"""

from __future__ import annotations

import os
from typing import Any


def allow() -> None:
    """Patch accelerate in this process, one of several ranks, before its state is initialized."""
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    own = PartialState._prepare_backend

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = own(self, *args, **kwargs)
        if backend is None and "WORLD_SIZE" in os.environ:
            deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
            return "gloo", kind if deepspeed else DistributedType.MULTI_GPU
        return backend, kind

    PartialState._prepare_backend = prepare_backend
    # Without `use_cpu`, bfloat16 requires a GPU, but `use_cpu` would disable the engines.
    training_args.is_torch_bf16_gpu_available = lambda: True
