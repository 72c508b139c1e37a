"""Which edges of a captured graph become programmatic, on a stand-in for the CUDA driver."""

import pytest

from jet_export.runtime.launch_edges import CudaGraphError, Driver, EdgeData, overlap_launches

KERNEL, MEMSET = 0, 2


class FakeCuda:
    """libcuda's calls over one graph. Nodes are numbers from 1 on; `names`: None is a memset."""

    def __init__(self, names: list[str | None], edges: list[tuple[int, int, int]]) -> None:
        self.names, self.table, self.fails = names, {(s, t): kind for s, t, kind in edges}, ""
        self.ports: dict[tuple[int, int], int] = {}

    def __getattr__(self, name: str):
        if name == self.fails:
            return lambda *_: 801
        return getattr(self, f"call_{name}")

    def call_cuGraphGetNodes(self, graph, nodes, n) -> int:
        n._obj.value = len(self.names)
        if nodes is not None:
            nodes[:] = range(1, len(self.names) + 1)
        return 0

    def call_cuGraphGetEdges_v2(self, graph, sources, targets, data, n) -> int:
        n._obj.value = len(self.table)
        if sources is not None:
            for i, ((source, target), kind) in enumerate(self.table.items()):
                sources[i], targets[i], data[i].type = source, target, kind
        return 0

    def call_cuGraphNodeGetType(self, node, kind) -> int:
        kind._obj.value = MEMSET if self.names[node.value - 1] is None else KERNEL
        return 0

    def call_cuGraphKernelNodeGetParams_v2(self, node, params) -> int:
        """Every second kernel comes from a library, as those of cuLibraryLoadData."""
        params._obj.func, params._obj.kern = (node.value, None) if node.value % 2 else (None, node.value)
        return 0

    def call_cuFuncGetName(self, name, function) -> int:
        name._obj.value = self.names[function.value - 1].encode()
        return 0

    call_cuKernelGetName = call_cuFuncGetName

    def call_cuGraphRemoveDependencies_v2(self, graph, sources, targets, data, n) -> int:
        for source, target in zip(sources[: n.value], targets[: n.value], strict=True):
            assert self.table.pop((source, target)) == 0
        return 0

    def call_cuGraphAddDependencies_v2(self, graph, sources, targets, data, n) -> int:
        for source, target, edge in zip(sources[: n.value], targets[: n.value], data[: n.value], strict=True):
            self.table[source, target], self.ports[source, target] = edge.type, edge.from_port
        return 0


def test_a_kernel_that_waits_starts_while_the_one_before_it_ends() -> None:
    names = [
        "triton_red_fused_0",
        "gemv_kernel_1",
        "decode_kernel_2",
        None,
        "gemv_kernel_1",
        "cublas_gemm",
        "gemv_kernel_0",
    ]
    edges = [(i, i + 1, 0) for i in range(1, 7)]
    cuda = FakeCuda(names, edges)
    assert overlap_launches(7, Driver(cuda)) == 3
    # not after a memset, which is no kernel, and not into a kernel of the library's, which does not wait
    assert cuda.table == {(1, 2): 1, (2, 3): 1, (3, 4): 0, (4, 5): 0, (5, 6): 0, (6, 7): 1}
    assert set(cuda.ports.values()) == {1}
    assert overlap_launches(7, Driver(cuda)) == 0  # once is enough


def test_a_kernel_with_several_dependencies_is_left_as_it_is() -> None:
    cuda = FakeCuda(["a", "b", "gemv_kernel"], [(1, 3, 0), (2, 3, 0)])
    assert overlap_launches(7, Driver(cuda)) == 0 and cuda.table == {(1, 3): 0, (2, 3): 0}


def test_a_call_that_fails_is_named() -> None:
    cuda = FakeCuda(["a", "gemv_kernel"], [(1, 2, 0)])
    cuda.fails = "cuGraphAddDependencies_v2"
    with pytest.raises(CudaGraphError, match="cuGraphAddDependencies_v2 failed: CUDA error 801"):
        overlap_launches(7, Driver(cuda))


def test_an_edge_has_the_layout_of_the_driver() -> None:
    edge = EdgeData(from_port=1, to_port=2, type=3)
    assert bytes(edge) == bytes([1, 2, 3, 0, 0, 0, 0, 0])
