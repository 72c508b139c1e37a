"""What a fleet of engines is started with. Travels to every process of the cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jet_export.bundle.manifest import Manifest
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.capacity import Serving
from jet_export.runtime.routing import POLICIES, SLACK
from jet_export.server.openai.options import ApiOptions
from jet_export.utils.errors import JetExportError

MOST = 1024  # replicas


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """replicas None: as many as the load needs, between `least` and `most`. `load_llm`: instead of AsyncLLM(bundle,
    serving), in each replica. Raises JetExportError."""

    bundle: str  # a path that every machine of the cluster has
    serving: Serving = field(default_factory=Serving)
    api: ApiOptions = field(default_factory=lambda: ApiOptions(names=()))
    generation_config: str = "none"
    replicas: int | None = 1
    least: int = 1
    most: int = 8
    router: str = "prefix"
    slack: int = SLACK
    ingresses: int = 1  # processes that take requests in
    gpus: float | None = None  # of a replica; None: 1 where the bundle is for a GPU
    cpus: float = 1  # of a replica, as Ray counts them
    load_llm: Callable[[], AsyncLLM] | None = None

    def __post_init__(self) -> None:
        if self.replicas is not None and not 1 <= self.replicas <= MOST:
            raise JetExportError(f"--replicas {self.replicas}: not between 1 and {MOST}.")
        if not 1 <= self.least <= self.most <= MOST:
            raise JetExportError(f"--replicas auto: {self.least} to {self.most} is no range of replicas.")
        if self.router not in POLICIES:
            raise JetExportError(f"router {self.router!r} is not known.", f"Known: {', '.join(POLICIES)}.")
        if self.ingresses < 1:
            raise JetExportError(f"--frontends {self.ingresses}: --replicas needs at least 1.")

    def gpus_each(self) -> float:
        """GPUs of a replica. Raises JetExportError for a bundle that cannot be read."""
        return float(Manifest.load(self.bundle).device.type == "cuda") if self.gpus is None else self.gpus

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> FleetConfig:
        """Of the arguments in a Serve config file. Raises JetExportError for one that is not known."""
        values = dict(values)
        try:
            serving = Serving(**values.pop("serving", {}))
            names = tuple(values.pop("names", ()))
            replicas = values.pop("replicas", 1)
            return cls(
                serving=serving,
                api=ApiOptions(names=names),
                replicas=parse_replicas(str(replicas)),
                **{**values, "bundle": str(Path(values["bundle"]))},
            )
        except (TypeError, KeyError, ValueError) as e:
            raise JetExportError(f"args of the application: {e}.", "See examples/ray/serve.yaml.") from None


def parse_replicas(text: str) -> int | None:
    """A number, or "auto": None. Raises JetExportError."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise JetExportError(f"--replicas {text}: neither a number nor auto.")
    return int(text)
