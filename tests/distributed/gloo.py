"""Lets every engine start on a machine without a GPU; for tests, never for the package.

accelerate decides the world from the devices it finds: without a GPU, DeepSpeed and FSDP ranks would each be
a run of its own. Here they talk over gloo, and the device is the CPU.
"""

from __future__ import annotations

import os
from typing import Any


def allow() -> None:
    """Patches accelerate in this process, a rank of several, before anything asks it for its state."""
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
    # bfloat16 is asked of a GPU unless `use_cpu` says otherwise, and that would leave out the engines.
    training_args.is_torch_bf16_gpu_available = lambda: True
