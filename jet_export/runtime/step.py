"""One step of continuous batching: its inputs, and the step while it runs on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jet_export.runtime.scheduler import Plan
from jet_export.runtime.sequence import RunningSequence


@dataclass(kw_only=True)
class StepInputs:
    """A plan in the form that the runner takes."""

    prefill_slots: list[int] = field(default_factory=list)
    prefill_tokens: list[list[int]] = field(default_factory=list)
    prompt_ends: list[int] = field(default_factory=list)  # rows of the prefill call that end a prompt
    saved_logits: list[Tensor] = field(default_factory=list)  # [vocab] each, of the resumed requests
    decode_slots: list[int] = field(default_factory=list)
    decode_tokens: list[int] = field(default_factory=list)
    device_tokens: Tensor | None = None  # [n] int64: used instead of decode_tokens, before the host knows them
    # Sequences that get a token: of prompt_ends, saved_logits and decode_slots, in this order.
    sampled: list[RunningSequence] = field(default_factory=list)
    sequences: list[RunningSequence] = field(default_factory=list)  # all that take part


@dataclass(kw_only=True)
class InFlightStep:
    """A step that has been launched."""

    plan: Plan
    inputs: StepInputs
    logits: Tensor  # [len(inputs.sampled), vocab]; the next step may overwrite them
    device_tokens: Tensor  # [len(inputs.sampled)] int64, the sampled tokens on the device
    tokens: Callable[[], list[int]]  # waits for the sampled tokens and returns them
    kept_logits: Tensor | None  # a copy on the CPU, if a sequence keeps its logits

    def next_decode(self, rows: list[int], slots: list[int]) -> StepInputs:
        """The decode step after this one for the sequences sampled in `rows`, fed with tokens still on the device."""
        tokens = self.device_tokens.clamp_min(0)  # -1: the sequence will end with an error
        if len(rows) < len(self.inputs.sampled):
            tokens = tokens[torch.tensor(rows, device=tokens.device)]
        sequences = [self.inputs.sampled[i] for i in rows]
        return StepInputs(decode_slots=slots, device_tokens=tokens, sampled=sequences, sequences=sequences)


def copy_to_host(values: Tensor) -> Callable[[], list[int]]:
    """Start a copy from the device. The returned function waits for these values, not for work launched after them."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return wait
