"""Which tensor arguments of a kernel torch's compiler takes to be written, in torch 2.11 and later. For programs with
Triton's interpreter off (kernel_compiler.py says why)."""

from typing import Any

import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap
from triton.backends.compiler import GPUTarget


class Driver:
    """An SM 9.0 GPU, of which nothing but its name is needed."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def written_tensors(kernel: Any, values: dict[str, Any]) -> list[str]:
    """Sorted names. `values`: all arguments; where torch can't read a kernel, it names every tensor."""
    triton.runtime.driver.set_active(Driver())
    module: Any = triton_kernel_wrap
    if not hasattr(module, "identify_accessed_tensors"):  # torch 2.11
        return sorted(module.identify_mutated_tensors(kernel, values, {}))
    return sorted(access.name for access in module.identify_accessed_tensors(kernel, values, {}).read_writes.writes)
