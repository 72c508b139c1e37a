"""An ONNX graph behind the engine interface."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.graph import feeds
from jet_export.backends.onnx.evaluate import Handler, OnnxModel
from jet_export.backends.onnx.export import GRAPH, VERIFY_GRAPH
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest
from jet_export.model.cache import PackedBatch, StateSpec
from jet_export.model.config import JetNemotronConfig


class OnnxEngine(Engine):
    """One graph for prefill and decode, and one for drafts where the bundle verifies any, evaluated node by node: exact
    and slow."""

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
        verify_graph: OnnxModel | None = None,
        state_interval: int = 1,
        rollback: int = 0,
    ) -> None:
        self.graph, self.config, self.limits, self.specs = graph, config, limits, specs
        self.dtype, self.device, self.verify_graph = dtype, device, verify_graph
        self.state_interval, self.rollback = state_interval, rollback
        self.weights = weights  # shared with the eager model that `verify` compares with; the graph has its own

    @classmethod
    def like(cls, engine: Engine, graph: OnnxModel, verify_graph: OnnxModel | None = None) -> OnnxEngine:
        """The graphs with the limits and states of another engine of the same model."""
        e = engine
        return cls(
            graph,
            config=e.config,
            limits=e.limits,
            specs=e.specs,
            dtype=e.dtype,
            device=e.device,
            verify_graph=verify_graph,
            state_interval=e.state_interval,
            rollback=e.rollback,
        )

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
            verify_graph=OnnxModel.load(directory / VERIFY_GRAPH, m.device, handlers) if m.rollback else None,
            state_interval=m.state_interval,
            rollback=m.rollback,
        )

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        return self._run(self.graph, input_ids, batch, logit_indices, states)

    @torch.inference_mode()
    def verify(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        if self.verify_graph is None:
            return super().verify(input_ids, batch, states)
        return self._run(self.verify_graph, input_ids, batch, all_rows(input_ids), states)

    def _run(
        self, graph: OnnxModel, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]
    ) -> Tensor:
        names = [s.name for s in self.specs]
        out = graph.run(feeds(names, input_ids, batch, logit_indices, states))
        for name, state in zip(names, states, strict=True):
            state.copy_(out[f"{name}_out"])
        return out["logits"]

    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        return self.prefill(input_ids, batch, all_rows(input_ids), states)


def all_rows(input_ids: Tensor) -> Tensor:
    """logit_indices of all tokens."""
    return torch.arange(input_ids.shape[0], dtype=torch.int32, device=input_ids.device)
