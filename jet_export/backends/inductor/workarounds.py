"""Names in AOTInductor's C++ that stay valid: a workaround for torch 2.11 to 2.13.

Inductor remembers the name of an array of sizes by the array and an `id` of where its declaration was written
(CppWrapperCpu.codegen_int_array_var): in 2.11 of the bound method `buffer.writeline`, which is a new object at every
access, in 2.13 of the buffer, of which some are gone before the package is there. Where Python gives the id to another
one, a name comes back whose declaration was never written there, and g++ stops at "'int_array_55' was not declared in
this scope": now and then, with nothing else changed. Here a buffer has one bound method, and both live until the
package is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lasting_names() -> Iterator[None]:
    """Inside, what names are remembered by is kept alive, one object for each buffer and graph."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    original: Any = CppWrapperCpu.codegen_int_array_var
    writers: dict[tuple[int, Any], Callable[..., None]] = {}
    graphs: dict[int, Any] = {}

    def keeping(
        self: Any, int_array: str, writeline: Callable[..., None], known_statically: bool = False, graph: Any = None
    ) -> str:
        owner = getattr(writeline, "__self__", writeline)  # lives as long as its method does
        one = writers.setdefault((id(owner), getattr(writeline, "__func__", None)), writeline)
        graphs[id(graph)] = graph
        return original(self, int_array, one, known_statically, graph)

    CppWrapperCpu.codegen_int_array_var = keeping  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.codegen_int_array_var = original  # type: ignore[method-assign]
