"""The device of this process, and what it can compute in."""

from __future__ import annotations

import torch
from torch import Tensor

_NO_FLOAT64 = frozenset({"mps"})


def has_accelerator() -> bool:
    """Whether there is a device other than the CPU that training uses: CUDA (or ROCm), or Apple's MPS."""
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def best_device() -> torch.device:
    """Return the device for work outside of a trainer: `cuda`, `mps` or `cpu`."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def bfloat16_supported() -> bool:
    """Whether the accelerator computes in bfloat16; MPS does from macOS 14 on."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    mps = torch.backends.mps
    return bool(mps.is_available() and mps.is_macos_or_newer(14, 0))


def widest_float(device: torch.device | str) -> torch.dtype:
    """Return the dtype for sums on a device: float64, or float32 if it has no float64 (MPS)."""
    return torch.float32 if torch.device(device).type in _NO_FLOAT64 else torch.float64


def widest(tensor: Tensor) -> Tensor:
    """Convert a tensor to the widest floating-point dtype of its device, see `widest_float`."""
    return tensor.to(widest_float(tensor.device))


def empty_cache() -> None:
    """Return memory that the allocator of the accelerator keeps; do nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def move(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    """Move a tensor to a device, converted from float64 to float32 if the device has no float64."""
    if tensor.dtype == torch.float64:
        tensor = tensor.to(widest_float(device))
    return tensor.to(device, non_blocking=non_blocking)
