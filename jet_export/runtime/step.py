"""A step of in-flight batching as the device is given it, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jet_export.runtime.scheduler import Plan

if TYPE_CHECKING:
    from jet_export.runtime.sequence import Sequence


@dataclass
class Step:
    """A plan as the runner takes it."""

    prefill_slots: list[int] = field(default_factory=list)
    prefill_tokens: list[list[int]] = field(default_factory=list)
    prefill_ends: list[int] = field(default_factory=list)  # rows of the prefill call that end a prompt
    drawn: list[Tensor] = field(default_factory=list)  # logits that came with a snapshot
    decode_slots: list[int] = field(default_factory=list)
    decode_tokens: list[int] = field(default_factory=list)  # unless `foreseen`
    # those that make a token: of prefill_ends, drawn, decode in turn
    makers: list[Sequence] = field(default_factory=list)
    everyone: list[Sequence] = field(default_factory=list)
    foreseen: Tensor | None = None  # the tokens to decode, [n] int64 on the device, not known here yet


@dataclass
class Flight:
    """A step that the device has been given."""

    plan: Plan
    step: Step
    logits: Tensor  # [len(step.makers), vocab]; the next flight may overwrite them
    drawn: Tensor  # [len(step.makers)] int64, on the device
    tokens: Callable[[], list[int]]  # the same; waits for them
    kept: Tensor | None


def fetch(values: Tensor) -> Callable[[], list[int]]:
    """Begin to copy from the device; the result waits for these values, and not for what is launched after them."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return wait
