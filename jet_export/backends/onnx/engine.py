"""An ONNX graph behind the engine interface."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.graph import feeds
from jet_export.backends.onnx.evaluate import Handler, OnnxModel
from jet_export.backends.onnx.export import GRAPH
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest
from jet_export.model.cache import PackedBatch, StateSpec
from jet_export.model.config import JetNemotronConfig


class OnnxEngine(Engine):
    """One graph for prefill and decode, evaluated node by node: exact and slow."""

    def __init__(
        self,
        graph: OnnxModel,
        *,
        config: JetNemotronConfig,
        limits: Limits,
        specs: list[StateSpec],
        dtype: torch.dtype,
        device: torch.device,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        self.graph, self.config, self.limits, self.specs = graph, config, limits, specs
        self.dtype, self.device = dtype, device
        self.weights = weights  # shared with the eager model that `verify` compares with; the graph has its own

    @classmethod
    def like(cls, engine: Engine, graph: OnnxModel) -> OnnxEngine:
        """The graph with the limits and states of another engine of the same model."""
        e = engine
        return cls(graph, config=e.config, limits=e.limits, specs=e.specs, dtype=e.dtype, device=e.device)

    @classmethod
    def open(
        cls, directory: Path, m: Manifest, weights: dict[str, Tensor], handlers: Mapping[str, Handler] | None = None
    ) -> OnnxEngine:
        """Load a bundle's graph. `handlers`: see OnnxModel.load."""
        return cls(
            OnnxModel.load(directory / GRAPH, m.device, handlers),
            config=m.config,
            limits=m.limits,
            specs=m.dtypes.specs(m.config),
            dtype=m.dtypes.model,
            device=m.device,
            weights=weights,
        )

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        names = [s.name for s in self.specs]
        out = self.graph.run(feeds(names, input_ids, batch, logit_indices, states))
        for name, state in zip(names, states, strict=True):
            state.copy_(out[f"{name}_out"])
        return out["logits"]

    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        rows = torch.arange(input_ids.shape[0], dtype=torch.int32, device=input_ids.device)
        return self.prefill(input_ids, batch, rows, states)
