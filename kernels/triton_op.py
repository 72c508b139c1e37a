"""torch.library.triton_op without its import of Inductor, which takes half of a process's start.

Where an op is made, torch looks through its source for the kernels that it launches: the keys of torch.compile's caches
hold their sources. Here it looks once it is asked for them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._library import triton as library

Function = Callable[..., Any]
FIND = "get_inner_triton_kernels"


class Kernels:
    """Those that a function launches, found when they are asked for."""

    def __init__(self, find: Callable[[Any], list[object]], function: Any) -> None:
        self.find, self.function = find, function

    def __iter__(self) -> Iterator[object]:
        return iter(self.find(self.function))


def triton_op(name: str, *, mutates_args: Iterable[str]) -> Callable[[Function], Function]:
    def make(function: Function) -> Function:
        find = getattr(library, FIND, None)
        if find is None:  # another torch
            return torch.library.triton_op(name, function, mutates_args=mutates_args)
        setattr(library, FIND, lambda function: Kernels(find, function))
        try:
            return torch.library.triton_op(name, function, mutates_args=mutates_args)
        finally:
            setattr(library, FIND, find)

    return make
