"""An Executor over a Ray cluster: builds wherever there are cores, measurements one at a time on each GPU of a kind.

Bundles come to the driver and go from there to the node that measures, so that nothing is lost with a node; the
database is the driver's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jet_export.search.cells import Cell
from jet_export.search.database import Entry
from jet_export.search.executor import SubprocessExecutor
from jet_export.search.ray_cluster import BUILD_CPUS, RayCluster
from jet_export.search.ray_node import packed, unpack

VERSIONS = ("torch", "triton", "kernels", "cuda")  # that a build shares with the nodes that measure


@dataclass(kw_only=True)
class RayExecutor(SubprocessExecutor):
    """See the module."""

    cluster: RayCluster

    @property
    def remote(self) -> bool:
        return True

    def run_build(self, task: dict[str, Any], cell: Cell) -> None:
        machine = self.setup.machine
        expects = {k: machine[k] for k in VERSIONS if k in machine}
        chunks = self.cluster.run("build", str(cell), {**task, "expects": expects, "threads": BUILD_CPUS})
        self.home.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{cell.key}.", dir=self.home))
        unpack(chunks, unfinished)
        shutil.rmtree(self.bundle(cell), ignore_errors=True)
        unfinished.rename(self.bundle(cell))

    def measure(self, cell: Cell, cases: list[tuple[int, int]]) -> None:
        task = {"setup": asdict(self.setup), "cases": cases, "device": self.device, "expects": self.setup.machine}
        chunks = list(self.sent(cell))
        (answer,) = self.cluster.run("measure", str(cell), {**self.common(cell), **task}, chunks)
        self.database.merge(self.setup, cell, [Entry(**e) for e in answer["entries"]])

    def sent(self, cell: Cell) -> Iterator[Any]:
        """The cell's bundle, in Ray's object store."""
        import ray

        with tempfile.TemporaryDirectory(dir=self.home) as directory:
            for chunk in packed(self.bundle(cell), Path(directory) / "bundle.tar"):
                yield ray.put(chunk)

    def stop(self) -> None:
        self.cluster.stop()
