"""A search on Ray's own cluster of two nodes: a process and a node are killed in it, and nothing is missing.

What the nodes' processes build and measure is a formula (helpers/ray_worker.py); everything around them is real."""

import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray")

from helpers.fake_executor import SPACE, prepared, searched
from helpers.ray_cluster import two_nodes
from helpers.ray_worker import HOST, latency

from jet_export.search import ray_node, worker
from jet_export.search.cells import whole_cell
from jet_export.search.machine import Host
from jet_export.search.ray_cluster import Needs, RayCluster, needs_of
from jet_export.search.run import run_search
from jet_export.search.search import Search
from jet_export.search.spec import SearchSpec
from jet_export.utils.errors import JetExportError

PATIENCE = 120.0  # seconds, for what takes one
SMALL = SPACE.replace('"16x64x2", "64x16x2", ', "")
CELLS = 2 + 2 + 1  # the jet sizes, attn and swa layers, the base


def lines(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_a_process_and_a_node_are_killed_and_nothing_is_missing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    emitted: list[str] = []
    with two_nodes({"measure": 1}) as nodes:
        Path(f"{log}.hold").write_text(f"measure any build {nodes[1].raylet}")
        cluster = RayCluster(needs=Needs(device="cpu", kind="measure"), emit=emitted.append)
        cluster.worker = (str(Path(__file__).parents[1] / "helpers/ray_worker.py"), str(log))
        assert cluster.slots() == (2, 2)
        host = cluster.host()
        options = prepared(tmp_path, SMALL, whole=1, jobs=2).spec.options
        search = Search(SearchSpec.from_options(options, host))

        def begun(kind: str, raylet: str) -> list[str]:
            """The line of the one that is held."""
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                if found := [x for x in lines(log) if x[0] == kind and raylet in ("any", x[-1])]:
                    return found[0]
                time.sleep(0.02)
            raise AssertionError(f"no {kind} has begun")

        def kill_a_node() -> None:
            begun("build", str(nodes[1].raylet))
            nodes[1].kill()

        def kill_a_process() -> None:
            os.kill(int(begun("measure", "any")[2]), signal.SIGKILL)

        for k in (kill_a_node, kill_a_process):
            threading.Thread(target=k, daemon=True).start()
        run_search(search, emitted.append, cluster=cluster)
    assert host == Host(**HOST) and not search.state.failed
    lost = [line for line in emitted if "was lost" in line]
    assert any("build: its node or process was lost" in line for line in lost), emitted
    assert any("measure: its node or process was lost" in line for line in lost), emitted
    times = Counter(tuple(x[:2]) for x in lines(log))
    assert sum(times.values()) == len(times) + len(lost)  # nothing else was done twice
    assert len(times) == 2 * (CELLS + 1)  # built and measured: the layers' engines, and one whole
    (whole,) = [e for e in search.state.evaluations.values() if e.measured]
    assert whole.config is not None and whole.measured is not None
    cell = whole_cell(whole.point, whole.config)
    assert whole.measured == {m: pytest.approx(latency(cell.describe(), *m)) for m in whole.measured}
    assert not list((search.spec.database_file.parent / "m.db.engines").rglob("manifest.json"))
    again = Search(SearchSpec.from_options(replace(options, resume=True), host))
    executor = searched(again)
    assert not executor.builds and again.chosen is not None  # the driver's database has all


@pytest.mark.parametrize(
    ("device", "kind", "resources", "found"),
    [
        ("cpu", None, {"CPU": 2, "measure": 1}, Needs(device="cpu", kind="measure")),
        ("auto", "idle", {"CPU": 2, "idle": 1}, Needs(device="cpu", kind="idle")),
        ("auto", None, {"CPU": 2, "GPU": 8, "accelerator_type:H100": 2}, Needs(device="cuda", kind="H100")),
        ("cuda", "L4", {"accelerator_type:H100": 2, "accelerator_type:L4": 2}, Needs(device="cuda", kind="L4")),
    ],
)
def test_what_a_cluster_is_asked_for(device: str, kind: str | None, resources: dict[str, float], found: Needs) -> None:
    assert needs_of(device, kind, resources) == found


@pytest.mark.parametrize(
    ("device", "kind", "resources", "said"),
    [
        ("cpu", None, {"CPU": 2}, "no node of the cluster has the resource 'measure'.*\nStart them with it: ray start"),
        ("cuda", None, {"CPU": 2}, "on which GPUs.*no GPU that Ray knows"),
        ("auto", None, {"accelerator_type:A": 1, "accelerator_type:B": 1}, "The cluster has A, B"),
        ("cuda", "H200", {"accelerator_type:H100": 1}, "--measure-on H200: no such GPU. The cluster has H100"),
        ("tpu", None, {}, "--device tpu: not known"),
    ],
)
def test_what_a_cluster_lacks_is_named(device: str, kind: str | None, resources: dict[str, float], said: str) -> None:
    with pytest.raises(JetExportError, match=said):
        needs_of(device, kind, resources)


def test_a_gpu_is_measured_alone_and_built_for_by_several() -> None:
    nodes = [{"CPU": 64, "GPU": 8, "accelerator_type:H100": 1}, {"CPU": 9}, {"GPU": 4, "accelerator_type:L4": 1}]
    needs = Needs(device="cuda", kind="H100")
    assert needs.slots(nodes) == (32, 8)  # an engine for a GPU is built beside one of its kind
    assert needs.of("measure") == {"num_gpus": 1, "num_cpus": 1, "accelerator_type": "H100"}
    assert 0 < needs.of("build")["num_gpus"] < 1
    assert Needs(device="cpu", kind="measure").slots(nodes) == (36, 1)


def test_a_bundle_travels_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_node, "CHUNK", 1000)
    made = tmp_path / "a"
    (made / "inner").mkdir(parents=True)
    (made / "inner" / "weights").write_bytes(os.urandom(12_345))
    (made / "manifest.json").write_text("{}")
    chunks = list(ray_node.packed(made, tmp_path / "tar"))
    assert len(chunks) > 12
    ray_node.unpack(chunks, tmp_path / "b")
    files = {p.relative_to(made): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()} == files


def test_a_machine_that_is_another_says_so() -> None:
    task = {"device": "cpu", "expects": {"device": "an abacus"}}
    answer = worker.answer_of(lambda t: worker.check_machine(t), task)
    assert answer["other_machine"] and "instead of an abacus" in answer["error"]
    assert worker.answer_of(lambda t: worker.check_machine(t), {**task, "expects": {}}) == {}
