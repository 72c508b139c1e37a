"""Copies between host and device that do not wait for what the device runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """On a GPU from pinned memory, which torch keeps until it is copied."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def upload(host: Tensor, target: Tensor) -> None:
    """Copy into a tensor on the device."""
    target.copy_(host.pin_memory() if target.device.type == "cuda" else host, non_blocking=True)


def copy_to_host(values: Tensor) -> Callable[[], Tensor]:
    """Start a copy from the device. The returned function waits for these values, not for work launched after them."""
    if values.device.type != "cuda":
        return lambda: values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
