"""The jet:: nodes of an ONNX graph run by the plugin library itself: handlers for `OnnxModel.load(..., handlers=...)`.

    graph = OnnxModel.load("model.onnx", "cuda", plugin_handlers(library_for(config, [90], ...)))

TensorRT is not involved: the C harness creates the plugin objects, asks them for shapes and workspace, and enqueues
them on torch tensors. States are returned in separate tensors, as the evaluator expects, so every call also takes the
path on which a plugin copies a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jet_export.plugins.harness.build import harness_library
from jet_export.plugins.harness.objects import Harness, Shapes
from jet_export.plugins.library import NAME
from jet_export.utils.errors import JetExportError

ALIGNMENT = 16  # bytes, of the addresses that the plugins accept


def aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def described(tensors: list[Tensor]) -> Shapes:
    return [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in tensors]


class PluginNode:
    """One plugin object with a node's attributes. `launched` is called after every enqueue, for simulated GPUs."""

    def __init__(
        self, harness: Harness, node: str, attributes: dict[str, Any], launched: Callable[[], None] | None = None
    ) -> None:
        self.harness, self.node, self.launched = harness, node, launched
        self.plugin = harness.create(node, attributes)
        if not self.plugin:
            raise JetExportError(f"{node}: {harness.messages().strip()}", "Build the plugin library for this model.")

    def close(self) -> None:
        if self.plugin:
            self.harness.c.destroy(self.plugin)
        self.plugin = None

    def output_shapes(self, inputs: list[Tensor]) -> Shapes:
        found = self.harness.outputs(self.node, self._made, described(inputs))
        return found or self._refused()

    @property
    def _made(self) -> int:
        assert self.plugin is not None, "closed"
        return self.plugin

    def _refused(self) -> Any:
        raise JetExportError(f"{self.node}: {self.harness.messages().strip()}")

    def enqueue(self, inputs: list[Tensor], outputs: list[Tensor], workspace: Tensor | None = None) -> None:
        """On the current stream. Raises JetExportError with the plugin's own message."""
        shapes = described(inputs)
        if workspace is None:
            workspace = self.workspace(inputs)
        cuda = inputs[0].device.type == "cuda"
        stream = torch.cuda.current_stream(inputs[0].device).cuda_stream if cuda else 0
        status = self.harness.enqueue(
            self.node,
            self._made,
            shapes,
            addresses=[t.data_ptr() for t in inputs],
            outputs=[t.data_ptr() for t in outputs],
            workspace=workspace.data_ptr(),
            stream=stream,
        )
        if status:
            self._refused()
        if self.launched:
            self.launched()

    def workspace(self, inputs: list[Tensor]) -> Tensor:
        """Workspace of the size that the plugin declares for these inputs, on their device."""
        size = self.harness.workspace(self.node, self._made, described(inputs))
        return torch.empty(max(size, 1), dtype=torch.uint8, device=inputs[0].device)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        held = [aligned(x) for x in inputs]
        device = held[0].device
        outputs = [
            torch.empty(shape, dtype=getattr(torch, dtype), device=device) for dtype, shape in self.output_shapes(held)
        ]
        self.enqueue(held, outputs)
        return tuple(outputs)


def plugin_handlers(
    library: str | Path, headers: str | Path | None = None, launched: Callable[[], None] | None = None
) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Handlers of the two nodes. `library`: the folder that `library_for` returns, or the file itself."""
    path = Path(library)
    harness = Harness(harness_library(headers), path / NAME if path.is_dir() else path)
    made: dict[tuple[Any, ...], PluginNode] = {}

    def handler(node: str) -> Callable[..., tuple[Tensor, ...]]:
        def run(attributes: dict[str, Any], *inputs: Tensor) -> tuple[Tensor, ...]:
            key = (node, *sorted(attributes.items()))
            if key not in made:
                made[key] = PluginNode(harness, node, attributes, launched)
            return made[key](*inputs)

        return run

    return {f"jet::{node}": handler(node) for node in ("JetBlock", "JetAttention")}
