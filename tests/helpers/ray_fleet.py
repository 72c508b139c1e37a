"""jet-tiny's tokenizer and states, with a formula in place of its layers, as the replicas of a fleet on two nodes of
Ray's own cluster: nothing is computed, so that 64 streams cost little.

While a test holds the engines, a step takes a second, so that it can act while requests run. The ingress and Serve's
proxy are on the head node; the other one can be killed."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from helpers.eager_tiny import LIMITS, write_bundle
from helpers.ray_cluster import RayNode, two_nodes
from jet_export.backends.eager import EagerEngine
from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch
from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import JET_TINY_DIR
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.llm import LLM
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.server.openai.options import ApiOptions
from jet_export.server.ray.config import FleetConfig
from jet_export.server.ray.serve import DIRECT

HELD = 1.0  # seconds of a step
SLOTS, WAITING = 28, 12  # of a replica: 64 streams run on two, but for 8 at least, which wait
SERVING = Serving(slots=SLOTS, max_waiting=WAITING, wait_timeout=1e6, prefix_cache_bytes=1 << 24, host_cache_bytes=0)
# As serve_fleet starts Ray; and on a busy machine the router waits for the replica that it prefers.
ENVIRONMENT = {
    **DIRECT,
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "30",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "30",
}


class Formula(EagerEngine):
    """After token t comes (7 t + 13) modulo the vocabulary."""

    def __init__(self) -> None:
        config = JetNemotronConfig.from_json_file(JET_TINY_DIR / "config.json")
        model: Any = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"), mtp=None)
        super().__init__(model, replace(LIMITS, max_batch_size=SLOTS))

    def step(
        self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor], logit_indices: Tensor | None, form: Form
    ) -> Tensor:
        last = input_ids if logit_indices is None else input_ids[logit_indices]
        logits = torch.zeros(len(last), self.config.vocab_size)
        return logits.scatter_(1, ((7 * last.long() + 13) % self.config.vocab_size)[:, None], 1.0)


def expected(prompts: list[str], tokens: int) -> list[str]:
    """The replicas' answers."""
    llm = LLM.over(Formula(), load_tokenizer(JET_TINY_DIR), -1, fingerprint="formula")
    return [c.text for c in llm.generate(prompts, tokens)]


class HeldEngine(BatchingEngine):
    """`hold`: a file; while it is there, a step takes HELD seconds."""

    hold: Path

    def step(self) -> bool:
        end = time.monotonic() + HELD
        while self.sequences and self.hold.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return super().step()


@dataclass(frozen=True)
class Load:
    """Loads the engine of a replica, and notes its process and its raylet in a directory."""

    directory: Path

    def __call__(self) -> AsyncLLM:
        from ray import serve

        name = serve.get_replica_context().replica_id.unique_id
        (self.directory / name).write_text(f"{os.getpid()} {os.environ['RAY_RAYLET_PID']}")
        engine = HeldEngine(Formula(), load_tokenizer(JET_TINY_DIR), -1, SERVING)
        engine.hold = self.directory.parent / "hold"
        return AsyncLLM.over(engine)

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Gives what lets the engines go on before the end."""
        hold = self.directory.parent / "hold"
        hold.touch()
        try:
            yield partial(hold.unlink, missing_ok=True)
        finally:
            hold.unlink(missing_ok=True)

    def process(self, replica: str) -> int:
        return int((self.directory / replica).read_text().split()[0])

    def raylet(self, replica: str) -> int:
        return int((self.directory / replica).read_text().split()[1])


def run(config: FleetConfig) -> None:
    """Deploy it, or replace what is deployed."""
    from ray import serve

    from jet_export.server.ray.app import APP, application

    ingress = application(config)._bound_deployment
    on_head = ingress.options(ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.01}})
    serve.run(on_head.bind(*ingress.init_args, **ingress.init_kwargs), name=APP, route_prefix="/")


def begin_metrics(node: RayNode) -> None:
    """The metrics are on the node that is to be killed; Ray would put them on either."""
    import ray
    from ray.exceptions import RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from jet_export.server.ray.app import APP, board

    end = time.monotonic() + 60
    while time.monotonic() < end:  # the scheduler may not know the node yet, or still know one that has been ended
        reports = board(APP, scheduling_strategy=NodeAffinitySchedulingStrategy(node.name, soft=True))
        with suppress(RayActorError):
            if ray.get(reports.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) == node.name:
                return
            ray.kill(reports)
        time.sleep(0.2)
    raise TimeoutError("The metrics are not on the node.")


@contextmanager
def fleet(directory: Path, port: int) -> Iterator[tuple[FleetConfig, list[RayNode]]]:
    """Served inside."""
    from ray import serve

    (directory / "replicas").mkdir()
    made = FleetConfig(
        bundle=str(write_bundle(directory / "jet-tiny")),
        serving=SERVING,
        api=ApiOptions(names=("jet-tiny",)),
        replicas=2,
        cpus=1,
        load_llm=Load(directory / "replicas"),
    )
    with two_nodes({}, **ENVIRONMENT) as nodes:
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": "127.0.0.1", "port": port},
                logging_config={"log_level": "ERROR"},
            )
            begin_metrics(nodes[1])
            run(made)
            yield made, nodes
        finally:
            serve.shutdown()
