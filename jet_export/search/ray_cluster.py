"""A Ray cluster as a search uses it: which nodes build, which measure, and tasks that are given to another node when
theirs is lost."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jet_export.search import ray_node
from jet_export.search.machine import Host
from jet_export.search.processes import WORKER
from jet_export.utils.errors import JetExportError

TRIES = 5  # nodes that a task is given to, one after the other as each is lost
WAITING = 30.0  # seconds without a node for a task, before the search says so
BUILD_CPUS = 2  # of a build
BUILD_GPU = 1 / 16  # of a build for a GPU, which runs on one: none is measured on it meanwhile
STAND_IN = "measure"  # a resource of the nodes that measure on their CPUs
ACCELERATOR = "accelerator_type:"


class NodeLost(Exception):
    """The node, or the process, that did a task is no more."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What tasks ask Ray for. `kind`: of GPU, or for a CPU a resource that nodes offer one of."""

    device: str  # cpu or cuda
    kind: str

    def of(self, work: str) -> dict[str, Any]:
        if self.device == "cpu":
            if work == "build":
                return {"num_cpus": BUILD_CPUS, "scheduling_strategy": "SPREAD"}
            return {"num_cpus": 0, "resources": {self.kind: 1}}
        gpus = BUILD_GPU if work == "build" else 1
        return {"num_gpus": gpus, "num_cpus": BUILD_CPUS if work == "build" else 1, "accelerator_type": self.kind}

    def slots(self, nodes: Sequence[Mapping[str, float]]) -> tuple[int, int]:
        """Builds and measurements that fit the nodes' resources at once, each at least 1."""
        if self.device == "cpu":
            measured = sum(n.get(self.kind, 0) for n in nodes)
        else:
            nodes = [n for n in nodes if n.get(ACCELERATOR + self.kind)]
            measured = sum(n.get("GPU", 0) for n in nodes)
        builds = sum(n.get("CPU", 0) // BUILD_CPUS for n in nodes)
        return max(1, int(builds)), max(1, int(measured))


def needs_of(device: str, kind: str | None, resources: Mapping[str, float]) -> Needs:
    """`device`: auto, cpu or cuda; `kind` None: the only one there is. Raises JetExportError."""
    gpus = sorted(r.removeprefix(ACCELERATOR) for r in resources if r.startswith(ACCELERATOR))
    if device not in ("auto", "cpu", "cuda"):
        raise JetExportError(f"--device {device}: not known.", "Known: auto, cpu, cuda.")
    if device == "cpu" or (device == "auto" and not gpus):
        kind = kind or STAND_IN
        if kind not in resources:
            raise JetExportError(
                f"--ray: no node of the cluster has the resource {kind!r}, by which those that measure are known.",
                f"""Start them with it: ray start --address ADDRESS --resources '{{"{kind}": 1}}'""",
            )
        return Needs(device="cpu", kind=kind)
    there = f"The cluster has {', '.join(gpus)}." if gpus else "The cluster has no GPU that Ray knows the kind of."
    if kind is None and len(gpus) != 1:
        raise JetExportError(f"--ray: on which GPUs to measure? {there}", "For example: --measure-on H100")
    if kind is not None and kind not in gpus:
        raise JetExportError(f"--measure-on {kind}: no such GPU. {there}")
    return Needs(device="cuda", kind=kind or gpus[0])


@dataclass(kw_only=True)
class RayCluster:
    """A cluster that this process is connected to."""

    needs: Needs
    emit: Callable[[str], None]
    worker: tuple[str, ...] = WORKER
    unlike: set[str] = field(default_factory=set)  # nodes that are not like the first
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: set[Any] = field(default_factory=set)  # ObjectRefGenerator
    stopped: bool = False

    @classmethod
    def connect(cls, address: str, device: str, kind: str | None, emit: Callable[[str], None]) -> RayCluster:
        """Raises JetExportError where Ray is not installed, nothing answers, or no node can measure."""
        try:
            import ray
        except ImportError:
            raise JetExportError("search --ray needs ray.", "Install it: pip install 'jet-export[ray]'") from None
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise JetExportError(f"--ray {address}: no cluster there ({e}).", "Start one: ray start --head") from None
        return cls(needs=needs_of(device, kind, ray.cluster_resources()), emit=emit)

    def slots(self) -> tuple[int, int]:
        """Builds and measurements at once."""
        import ray

        return self.needs.slots([n["Resources"] for n in ray.nodes() if n["Alive"]])

    def host(self) -> Host:
        """What one of the nodes that measure is. Raises JetExportError."""
        (answer,) = self.run("describe", "a node that measures", {"device": self.needs.device})
        return Host(**answer["host"])

    def run(self, work: str, name: str, task: dict[str, Any], args: list[Any] | None = None) -> list[Any]:
        """What a task of ray_node.py gives, in order; of a lost node nothing, and the task is done again. Raises
        JetExportError if the task fails, or TRIES nodes are lost."""
        for _ in range(TRIES):
            try:
                found = list(self.attempt(work, name, task, args or []))
            except NodeLost as e:
                if self.stopped:
                    break
                self.emit(f"  {name}: {work}: its node or process was lost ({e}); once more")
                continue
            if found is not None and not (isinstance(found[-1], dict) and "error" in found[-1]):
                return found[1:]
            node, error = found[0]["node"], found[-1]
            if not error["other_machine"]:
                raise JetExportError(f"{name}: {error['error']}")
            with self.lock:
                self.unlike.add(node)
            self.emit(f"  node {node[:8]} is not used: {error['error']}")
        raise JetExportError(f"{name}: {work} given up: " + ("stopped." if self.stopped else f"{TRIES} nodes failed."))

    def attempt(self, work: str, name: str, task: dict[str, Any], args: list[Any]) -> Iterator[Any]:
        """Raises NodeLost."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        remote = ray.remote(getattr(ray_node, work))
        needs = self.needs.of(work) | {"max_retries": 0, "num_returns": "streaming"}
        if self.unlike:
            needs["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self.unlike))})"}
        stream = remote.options(**needs).remote(self.common(task), *args)
        with self.lock:
            self.running.add(stream)
        try:
            ready, _ = ray.wait([stream], timeout=WAITING, fetch_local=False)
            if not ready:
                self.emit(f"  {name}: waiting for a node that has {self.needs.of(work)}")
            for ref in stream:
                yield ray.get(ref)
        except RayTaskError:
            raise
        except RayError as e:
            raise NodeLost(type(e).__name__) from None
        finally:
            with self.lock:
                self.running.discard(stream)

    def common(self, task: dict[str, Any]) -> dict[str, Any]:
        return {**task, "worker": list(self.worker), "omp_threads": os.environ.get(ray_node.THREADS)}

    def stop(self) -> None:
        """End what runs, and begin no more."""
        import ray

        self.stopped = True
        with self.lock:
            running = list(self.running)
        for stream in running:
            ray.cancel(stream, force=True)
