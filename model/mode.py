"""The kind of engine that the model is being traced for: read in JetBlock, Attention and the linear layers only.

eager, inductor   the ops of `jet_export.kernels`, which update the states in place
onnx              nodes of an ONNX graph, states in and states out (onnx_nodes.py)
one_row           the graph always gets one token: linear layers are jet::gemv
fused             and take norms, activations, quantisation and residuals in (linear.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

Mode = Literal["eager", "inductor", "onnx"]
_mode: Mode = "eager"
_one_row = False
_fused = False
_states_out: list[Tensor] = []


@contextmanager
def graph_mode(mode: Mode, one_row: bool = False, fused: bool = False) -> Iterator[list[Tensor]]:
    """Trace for `mode` inside the block. Yields the list that onnx nodes append their states to, in the order of
    cache.state_specs. One thread at a time."""
    global _mode, _states_out, _one_row, _fused
    before = _mode, _states_out, _one_row, _fused
    _mode, _states_out, _one_row, _fused = mode, [], one_row, one_row and fused
    try:
        yield _states_out
    finally:
        _mode, _states_out, _one_row, _fused = before


def onnx_mode() -> bool:
    return _mode == "onnx"


def one_row_mode() -> bool:
    return _one_row


def fused_mode() -> bool:
    return _fused


def keep_states(*states: Tensor) -> None:
    """Record a node's states after the step; called layer by layer."""
    _states_out.extend(states)
