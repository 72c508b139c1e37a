"""Triton's interpreter as a memory checker: every load and store must lie in a tensor that the launch was given."""

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor


class Memory:
    """The bytes that may be touched, how many accesses there were, and how many there may be."""

    def __init__(self, tensors: list[Tensor], limit: int) -> None:
        self.bounds: list[tuple[int, int]] = []
        self.accesses, self.limit = 0, limit
        self.kept = list(tensors)  # alive: an address must not be given out twice
        for tensor in tensors:
            self.allow(tensor)

    def allow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        bisect.insort(self.bounds, (storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    def check(self, what: str, pointers, mask) -> None:
        self.accesses += 1
        if self.accesses > self.limit:
            raise AssertionError(f"more than {self.limit} loads and stores: a loop without bound")
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if not addresses.size:
            return
        low = np.array([b for b, _ in self.bounds], dtype=np.uint64)
        high = np.array([e for _, e in self.bounds], dtype=np.uint64)
        at = np.searchsorted(low, addresses, side="right") - 1
        inside = (at >= 0) & (addresses + np.uint64(size) <= high[np.maximum(at, 0)])
        if not inside.all():
            wrong = int(addresses[~inside][0])
            near, _ = min(self.bounds, key=lambda b: abs(b[0] - wrong))
            raise AssertionError(f"{what} outside every tensor, {wrong - near:+d} bytes from the start of the nearest")


@contextmanager
def checked_memory(tensors: list[Tensor], limit: int = 1 << 40) -> Iterator[Memory]:
    """Checks launches of interpreted kernels over `tensors` and over what launchers allocate meanwhile."""
    from triton.runtime.interpreter import InterpreterBuilder

    memory = Memory([t for t in tensors if isinstance(t, torch.Tensor)], limit)
    load, store, new_empty = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        Tensor.new_empty,
    )

    def checked_load(self, ptrs, mask, *rest):
        memory.check("a load", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        memory.check("a store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def allocate(self: Tensor, *shape, **kwargs) -> Tensor:
        out = new_empty(self, *shape, **kwargs).zero_()
        memory.kept.append(out)
        memory.allow(out)
        return out

    with (
        patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        patch.object(InterpreterBuilder, "create_masked_store", checked_store),
        patch.object(Tensor, "new_empty", allocate),
    ):
        yield memory
