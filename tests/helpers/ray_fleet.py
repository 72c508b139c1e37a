"""jet-tiny on the eager engine as the replicas of a fleet on a Ray cluster of this machine: nothing is compiled.

A step takes STEP seconds at least, so that a test can act while requests run."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers.eager_tiny import tiny_engine, write_bundle
from helpers.paths import TESTS
from jet_export.model.hub import JET_TINY_DIR
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.server.openai.options import ApiOptions
from jet_export.server.ray.config import FleetConfig

STEP = 0.02
SERVING = Serving(slots=4, max_waiting=2, prefix_cache_bytes=1 << 24, host_cache_bytes=0)


class SlowEngine(BatchingEngine):
    def step(self) -> bool:
        if self.sequences:
            time.sleep(STEP)
        return super().step()


@dataclass(frozen=True)
class Load:
    """Loads the engine of a replica, and notes its process in a directory."""

    directory: Path

    def __call__(self) -> AsyncLLM:
        (self.directory / str(os.getpid())).touch()
        return AsyncLLM.over(SlowEngine(tiny_engine(), load_tokenizer(JET_TINY_DIR), -1, SERVING))

    def pids(self) -> list[int]:
        return sorted(int(f.name) for f in self.directory.iterdir())


@contextmanager
def fleet(directory: Path, port: int) -> Iterator[FleetConfig]:
    """Served inside, on a cluster of its own."""
    import ray
    from ray import serve

    from jet_export.server.ray.app import APP, application

    (directory / "pids").mkdir()
    made = FleetConfig(
        bundle=str(write_bundle(directory / "jet-tiny")),
        serving=SERVING,
        api=ApiOptions(names=("jet-tiny",)),
        replicas=2,
        cpus=0.1,
        load_llm=Load(directory / "pids"),
    )
    environ = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}  # of the workers, which import this module
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
        serve.run(application(made), name=APP, route_prefix="/")
        yield made
    finally:
        serve.shutdown()
        ray.shutdown()
        os.environ.clear()
        os.environ.update(environ)
