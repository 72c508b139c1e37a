"""A stand-in for CUDA graphs on a CPU: a capture records a call's operations, a replay runs them on the same memory.

As on a GPU a replay reads what the capture read, whatever Python has bound to a name since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Tape(TorchDispatchMode):
    """The operations that ran under it. `read`: the tensors that they read and none of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.read: list[Tensor] = []
        self.made: set[int] = set()
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.read += [x for x in tensors((args, kwargs)) if place(x) not in self.made]
        out = func(*args, **kwargs)
        given = {place(x) for x in tensors((args, kwargs))}
        self.made |= {place(x) for x in tensors(out)} - given
        self.operations.append((func, args, kwargs, tensors(out)))
        return out

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            for func, args, kwargs, outputs in self.operations:
                for old, new in zip(outputs, tensors(func(*args, **kwargs)), strict=True):
                    if place(old) != place(new):  # otherwise a view, or written in place
                        old.copy_(new)


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(call: Callable[[], Tensor]) -> tuple[Tape, Tensor]:
    """A capture, which runs the call twice."""
    with torch.inference_mode():
        call()
        with Tape() as tape:
            result = call()
    return tape, result
