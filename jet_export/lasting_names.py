"""Names in AOTInductor's C++ that stay valid: a workaround for torch 2.11 to 2.13.

Inductor remembers the name of an array of sizes by the array and the `id` of the buffer that its declaration went to
(CppWrapperCpu.codegen_int_array_var). Buffers come and go while a package is generated; where Python gives a new one
the id of one that is gone, a name comes back whose declaration was never written to it, and g++ stops at
"'int_array_55' was not declared in this scope": now and then, with nothing else changed. Here every such buffer lives
until the package is there, so that no id is used twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lasting_names() -> Iterator[None]:
    """Inside, buffers and graphs that names are remembered by are kept alive."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    original: Any = CppWrapperCpu.codegen_int_array_var
    kept: dict[int, Any] = {}

    def keeping(
        self: Any, int_array: str, writeline: Callable[..., None], known_statically: bool = False, graph: Any = None
    ) -> str:
        for owner in (getattr(writeline, "__self__", writeline), graph):
            kept[id(owner)] = owner
        return original(self, int_array, writeline, known_statically, graph)

    CppWrapperCpu.codegen_int_array_var = keeping  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.codegen_int_array_var = original  # type: ignore[method-assign]
