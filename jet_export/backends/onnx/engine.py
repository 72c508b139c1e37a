"""An ONNX bundle behind the engine interface, and its graph beside the model with every value forced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from jet_export.backends.base import Engine, manifest_specs
from jet_export.backends.graph import feeds
from jet_export.backends.onnx.evaluate import Handler, OnnxModel
from jet_export.backends.onnx.export import GRAPH
from jet_export.bundle.dtypes import torch_dtype
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest
from jet_export.model.cache import PackedBatch, StateSpec
from jet_export.model.config import JetNemotronConfig


class OnnxEngine(Engine):
    """One graph for prefill and decode, evaluated node by node: exact and slow."""

    def __init__(
        self, graph: OnnxModel, config: JetNemotronConfig, limits: Limits, specs: list[StateSpec],
        dtype: torch.dtype, device: torch.device, weights: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.config, self.limits, self.specs = graph, config, limits, specs
        self.dtype, self.device = dtype, device
        self.weights = weights  # for the eager model that `verify` compares with; the graph reads its own

    @classmethod
    def open(
        cls, directory: Path, m: Manifest, weights: dict[str, Tensor], handlers: Mapping[str, Handler] | None = None
    ) -> OnnxEngine:
        """A bundle's. `handlers`: see OnnxModel.load."""
        graph = OnnxModel.load(directory / GRAPH, m.device, handlers)
        return cls(graph, m.config, m.limits, manifest_specs(m), torch_dtype(m.dtype), m.device, weights)

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
