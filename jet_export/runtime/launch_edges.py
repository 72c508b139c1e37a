"""Programmatic edges in a captured CUDA graph: a kernel starts while the one before it ends.

AOTInductor launches kernels plainly, so a captured step runs them one after the other, and each launch waits for the
last program of the kernel before. Kernels that call `await_inputs` (kernels/common.py) say themselves when they need
what came before. Their incoming edges become programmatic here, which is what a launch with the attribute for
programmatic dependent launch would have been captured as: no launcher of our own is needed for it, and whatever
compiled the kernels, the same graph comes out. CUDA 12.3 or newer, SM 9.0 or newer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from typing import Any

# Kernels that call await_inputs; compilers add to their names.
WAITING = (
    "gemv_kernel",
    "skinny_kernel",
    "add_norm_kernel",
    "decode_kernel",
    "decode_inputs_kernel",
    "verify_inputs_kernel",
    "deferred_step_kernel",
    "attention_decode_kernel",
    "attention_combine_kernel",
)
KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL
PROGRAMMATIC_PORT, PROGRAMMATIC = 1, 1  # CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC


class EdgeData(Structure):
    """CUgraphEdgeData."""

    _fields_ = (("from_port", c_ubyte), ("to_port", c_ubyte), ("type", c_ubyte), ("reserved", c_ubyte * 5))


class KernelNodeParams(Structure):
    """CUDA_KERNEL_NODE_PARAMS."""

    _fields_ = (
        ("func", c_void_p),
        ("sizes", c_uint * 7),  # grid, block, shared memory
        ("kernel_params", c_void_p),
        ("extra", c_void_p),
        ("kern", c_void_p),
        ("ctx", c_void_p),
    )


class CudaGraphError(RuntimeError):
    """A call of the CUDA driver failed."""


class Driver:
    """The few calls that are needed, by libcuda.so.1. `library` stands in for it in tests."""

    def __init__(self, library: Any = None) -> None:
        self.library: Any = library or ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise CudaGraphError(f"{name} failed: CUDA error {status}")

    def nodes(self, graph: c_void_p) -> list[int]:
        n = c_size_t()
        self.call("cuGraphGetNodes", graph, None, byref(n))
        nodes = (c_void_p * n.value)()
        self.call("cuGraphGetNodes", graph, nodes, byref(n))
        return [node or 0 for node in nodes]

    def edges(self, graph: c_void_p) -> list[tuple[int, int, EdgeData]]:
        n = c_size_t()
        self.call("cuGraphGetEdges_v2", graph, None, None, None, byref(n))
        sources, targets, data = (c_void_p * n.value)(), (c_void_p * n.value)(), (EdgeData * n.value)()
        self.call("cuGraphGetEdges_v2", graph, sources, targets, data, byref(n))
        return [(s or 0, t or 0, d) for s, t, d in zip(sources, targets, data, strict=True)]

    def kernel_name(self, node: int) -> str | None:
        """None if the node launches no kernel."""
        kind = c_int()
        self.call("cuGraphNodeGetType", c_void_p(node), byref(kind))
        if kind.value != KERNEL_NODE:
            return None
        params, name = KernelNodeParams(), c_char_p()
        self.call("cuGraphKernelNodeGetParams_v2", c_void_p(node), byref(params))
        if params.func:
            self.call("cuFuncGetName", byref(name), c_void_p(params.func))
        else:
            self.call("cuKernelGetName", byref(name), c_void_p(params.kern))
        return (name.value or b"").decode()

    def replace(self, graph: c_void_p, edges: Sequence[tuple[int, int]]) -> None:
        """Make these edges programmatic."""
        n = len(edges)
        sources = (c_void_p * n)(*(source for source, _ in edges))
        targets = (c_void_p * n)(*(target for _, target in edges))
        old, new = (EdgeData * n)(), (EdgeData * n)()
        for data in new:
            data.from_port, data.type = PROGRAMMATIC_PORT, PROGRAMMATIC
        self.call("cuGraphRemoveDependencies_v2", graph, sources, targets, old, c_size_t(n))
        self.call("cuGraphAddDependencies_v2", graph, sources, targets, new, c_size_t(n))


def waits(name: str | None) -> bool:
    """Whether a kernel of this name calls await_inputs."""
    return name is not None and any(known in name for known in WAITING)


def overlap_launches(graph: int, driver: Driver | None = None) -> int:
    """Make the edges between a kernel and a waiting one programmatic, before the graph is instantiated; how many.

    graph: the cudaGraph_t, as an integer. Only kernels with one dependency: a graph captured from one stream has no
    others. Raises CudaGraphError."""
    driver, handle = driver or Driver(), c_void_p(graph)
    names = {node: driver.kernel_name(node) for node in driver.nodes(handle)}
    edges = driver.edges(handle)
    incoming = [target for _, target, _ in edges]
    chosen = [
        (source, target)
        for source, target, data in edges
        if names[source] is not None and waits(names[target]) and not data.type and incoming.count(target) == 1
    ]
    if chosen:
        driver.replace(handle, chosen)
    return len(chosen)
