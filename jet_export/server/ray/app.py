"""The Ray Serve application: an ingress that has the OpenAI API, and a deployment of engines.

    serve deploy examples/ray/serve.yaml            # import_path jet_export.server.ray.app:build

Pinned to one version of Ray: request routers are an alpha interface there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import ASGIApp

from jet_export.bundle.manifest import Manifest
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.serving_engine import RequestLimits, Status
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.server.ray.autoscaling import KV_USED, policy
from jet_export.server.ray.call import Call, Outputs, Refusal
from jet_export.server.ray.client import FleetEngine, Overloaded, ReplicaLost
from jet_export.server.ray.config import FleetConfig
from jet_export.server.ray.engine import EngineReplica
from jet_export.server.ray.metrics import Board, merged
from jet_export.server.ray.router import PrefixRouter

log = logging.getLogger(__name__)
APP, INGRESS, ENGINE = "jet-export", "Api", "Engine"
NAMESPACE = "jet-export"
SPARE = 1.25  # calls that Serve lets a replica have, of those that its engine takes: it refuses the others itself
ROUTING = 64  # calls of an ingress that are on their way to a replica, at least: many may arrive at once
STATUS_S = 2.0  # that the metrics may take
AUTOSCALE_AT = 0.75  # of the sequences at once: requests a replica, on average


def board(app: str, **options: Any) -> Any:
    """The actor that has the metrics of an application. `options`: of Ray, where it is made."""
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Board)  # its node may die
    named = {"name": f"metrics of {app}", "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
    return actor.options(**named, **options).remote()


class Engine:
    """A replica; see engine.py."""

    def __init__(self, config: FleetConfig) -> None:
        context = serve.get_replica_context()
        name, reports = context.replica_id.unique_id, board(context.app_name)
        make = config.load_llm or partial(AsyncLLM, config.bundle, config.serving)
        self.replica = EngineReplica(make, lambda text: reports.put.remote(name, text))

    async def generate(self, call: Call) -> AsyncIterator[Outputs | Refusal]:
        async with aclosing(self.replica.generate(call)) as parts:
            async for part in parts:
                yield part

    def check_health(self) -> None:
        self.replica.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {KV_USED: self.replica.kv_used()}

    def __del__(self) -> None:
        if hasattr(self, "replica"):
            self.replica.stop()


class HandleAnswer:
    """What a replica answers, with Ray's errors in client.py's words."""

    def __init__(self, parts: DeploymentResponseGenerator[Outputs | Refusal]) -> None:
        self.parts = parts

    async def __aiter__(self) -> AsyncIterator[Outputs | Refusal]:
        try:
            async for part in self.parts:
                yield part
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError, RequestCancelledError) as e:
            raise ReplicaLost(type(e).__name__) from None
        except BackPressureError:
            raise Overloaded from None

    def cancel(self) -> None:
        self.parts.cancel()


def api(config: FleetConfig, handle: DeploymentHandle[Any]) -> ASGIApp:
    """The OpenAI API over the engines behind `handle`."""
    from jet_export.server.openai.app import create_app
    from jet_export.server.openai.chat import load_chat_template, load_tokenizer_config
    from jet_export.server.openai.defaults import load_sampling_defaults

    bundle, manifest = config.bundle, Manifest.load(config.bundle)
    streaming, reports = handle.options(stream=True), board(serve.get_replica_context().app_name)
    texts: dict[str, str] = {}

    async def status() -> Status:
        nonlocal texts
        with suppress(RayActorError, TimeoutError):  # while it is being started on another node: the last that is known
            texts = await asyncio.wait_for(reports.read.remote(), STATUS_S)
        return Status(bool(texts), merged(texts))

    def send(call: Call) -> HandleAnswer:
        return HandleAnswer(streaming.generate.remote(call))

    defaults = load_sampling_defaults(bundle) if config.generation_config == "auto" else {}
    names = config.api.names or (str(manifest.model["name"]),)
    engine = FleetEngine(send, load_tokenizer(bundle), limits(config, manifest), manifest.config.vocab_size, status)
    options = replace(config.api, names=names, sampling_defaults=defaults)
    template = load_chat_template(bundle, config.api.chat_template)
    return create_app(engine, options, template, load_tokenizer_config(bundle))


def limits(config: FleetConfig, manifest: Manifest) -> RequestLimits:
    """Of a request; the engines may have less memory, and say so."""
    serving, longest = config.serving, manifest.limits.max_seq_len
    slots = serving.slots or manifest.limits.max_batch_size
    return RequestLimits(slots, serving.max_waiting, min(longest, serving.kv_tokens or longest))


def application(config: FleetConfig) -> Application:
    """The application of a fleet. Raises JetExportError for a bundle that cannot be read."""
    manifest = Manifest.load(config.bundle)
    takes = limits(config, manifest)
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.replicas is None:
        target = max(1.0, AUTOSCALE_AT * takes.slots)
        scaling["autoscaling_config"] = {
            "min_replicas": config.least,
            "max_replicas": config.most,
            "target_ongoing_requests": target,
            "policy": {"policy_function": f"{policy.__module__}:{policy.__name__}"},
        }
        del scaling["num_replicas"]
    routing = RequestRouterConfig(
        request_router_class=PrefixRouter, request_router_kwargs={"policy": config.router, "slack": config.slack}
    )
    engine = serve.deployment(Engine).options(
        name=ENGINE,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus_each()},
        max_ongoing_requests=int(SPARE * (takes.slots + takes.max_waiting)) + 1,
        max_queued_requests=max(ROUTING, takes.slots + takes.max_waiting),
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=600,
        request_router_config=routing,
        **scaling,
    )

    def build_api() -> ASGIApp:
        return api(config, serve.get_deployment_handle(ENGINE, serve.get_replica_context().app_name))

    ingress = serve.deployment(serve.ingress(build_api)()).options(
        name=INGRESS,
        num_replicas=config.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=600,
    )
    return ingress.bind(engine.bind(config))


def build(args: Mapping[str, Any]) -> Application:
    """For `serve deploy` and `serve run`: the application of a config file's args."""
    return application(FleetConfig.of(args))
