"""A process that enqueues plugins on a driver that records (fake_cuda.cpp). Imports no torch, so that it is quick."""

import ctypes
import json
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_uint64
from pathlib import Path

from jet_export.plugins.harness.objects import Harness

HERE = Path(__file__).parent


def compile_shared(source: str, to: Path, includes: list[Path], *flags: str) -> Path:
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-fPIC", "-shared", str(HERE / source), "-o", str(to), *flags]
    command += [flag for folder in includes for flag in ("-isystem", str(folder))] + ["-ldl"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return to


def image_hash(cubin: bytes) -> int:
    """As fake_cuda.cpp has it."""
    (end,) = struct.unpack_from("<Q", cubin, 40)
    h = 14695981039346656037
    for byte in cubin[:end]:
        h = ((h ^ byte) * 1099511628211) & (2**64 - 1)
    return h


class FakeGpu:
    """fake_cuda.cpp: once loaded it is the process's libcuda.so.1."""

    def __init__(self, library: Path, kernels: list[dict]):
        self.c = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        for kernel in kernels:
            sizes = kernel["parameters"]
            self.c.fake_parameters(kernel["name"].encode(), (c_int * len(sizes))(*sizes), len(sizes))

    def take(self) -> list[dict]:
        """The launches since the last call."""
        found = []
        for i in range(self.c.fake_count()):
            name, numbers = ctypes.create_string_buffer(128), (c_uint64 * 64)()
            n = self.c.fake_launch(i, name, numbers)
            v = list(numbers[:n])
            found.append(
                {
                    "name": name.value.decode(),
                    "grid": v[:3],
                    "block": v[3:6],
                    "shared": v[6],
                    "stream": v[7],
                    "image": v[8],
                    "args": v[9:],
                }
            )
        self.c.fake_clear()
        return found

    def contexts(self) -> tuple[list[int], int]:
        """Each context pushed since the last call, 0 for each popped; how many this thread has left on its stack."""
        events, left = (c_uint64 * 4096)(), c_int()
        n = self.c.fake_contexts(events, ctypes.byref(left))
        return list(events[:n]), left.value


def run_job(path: Path) -> dict:
    """A job file's enqueues in a process of their own (see test_launches.py); prints what happened as JSON."""
    job = json.loads(path.read_text())
    harness = Harness(job["harness"], job["library"])
    gpu = FakeGpu(job["fake"], job["kernels"]) if job["fake"] else None
    results = []

    def enqueue(step: dict) -> int:
        plugin = harness.create(step["node"], step["fields"])
        assert plugin is not None, harness.messages()
        return harness.enqueue(
            step["node"],
            plugin,
            step["inputs"],
            addresses=step["addresses"],
            outputs=step["outputs"],
            workspace=step["workspace"],
            stream=step.get("stream", 77),
        )

    if gpu and job.get("threads"):  # ctypes lets them run at once
        gpu.c.fake_context(all(step.get("context", True) for step in job["steps"]))
        with ThreadPoolExecutor(job["threads"]) as pool:
            statuses = list(pool.map(enqueue, job["steps"]))
        return {"statuses": statuses, "launches": gpu.take(), "loads": gpu.c.fake_loads(), "contexts": gpu.contexts()}
    for step in job["steps"]:
        if gpu:
            gpu.c.fake_device(*step.get("device", [9, 0, 132]))
            gpu.c.fake_fail(step.get("fail", "").encode())
            gpu.c.fake_context(step.get("context", True))
        status = enqueue(step)
        results.append(
            {
                "status": status,
                "message": harness.messages(),
                "launches": gpu.take() if gpu else [],
                "contexts": gpu.contexts() if gpu else None,
            }
        )
    return {"results": results, "loads": gpu.c.fake_loads() if gpu else 0}


if __name__ == "__main__":
    import sys

    print(json.dumps(run_job(Path(sys.argv[1]))))
