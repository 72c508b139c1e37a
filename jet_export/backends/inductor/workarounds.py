"""A workaround for undeclared names in AOTInductor's C++, torch 2.11 to 2.13.

CppWrapperCpu.codegen_int_array_var caches the name of an array of sizes, keyed by the array and by the `id` of what its
declaration was written to: in 2.11 the bound method `buffer.writeline`, a new object at every access; in 2.13 the
buffer, which may be freed before the package is finished. When Python reuses such an id, the cache returns a name that
was never declared in the new buffer, and g++ occasionally fails with "'int_array_55' was not declared in this scope".
Here every buffer keeps one bound method, and both stay alive until the package is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lasting_names() -> Iterator[None]:
    """Keep alive the objects whose ids key the cache of names, one for each buffer and graph."""
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
        return str(original(self, int_array, one, known_statically, graph))

    CppWrapperCpu.codegen_int_array_var = keeping  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.codegen_int_array_var = original  # type: ignore[method-assign]
