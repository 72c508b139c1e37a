"""Ray's own cluster of two nodes on this machine."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from helpers.paths import TESTS

# A node that is killed is noticed at once; processes are started when they are needed.
CONFIG = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
}


@dataclass
class RayNode:
    node: Any

    @property
    def name(self) -> str:
        """Its id, as Ray gives it."""
        return str(self.node.node_id)

    @property
    def raylet(self) -> int:
        """Its process."""
        return int(self.node.all_processes["raylet"][0].process.pid)

    def kill(self) -> None:
        """The raylet; its processes end when they no longer see it, so it must not be left as a zombie."""
        process = self.node.all_processes["raylet"][0].process
        process.kill()
        process.wait()


@contextmanager
def two_nodes(resources: dict[str, float], **environment: str) -> Iterator[list[RayNode]]:
    """Connected to inside; each with two cores and the resources, the first is the head."""
    import ray
    from ray.cluster_utils import Cluster

    environ, at_sigterm = dict(os.environ), signal.getsignal(signal.SIGTERM)
    path = f"{TESTS / 'helpers/without_pandas'}:{TESTS}"
    os.environ |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}  # of Ray's processes
    cluster = Cluster()
    try:
        lean = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        nodes = [
            RayNode(cluster.add_node(num_cpus=2, resources=resources, **lean, **more))
            for more in ({"_system_config": CONFIG}, {})
        ]
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield nodes
    finally:
        ray.shutdown()
        cluster.shutdown()
        signal.signal(signal.SIGTERM, at_sigterm)  # ray.init sets its own, and leaves it
        os.environ.clear()
        os.environ.update(environ)
