"""The kind of engine that the model is being traced for: read in JetBlock, Attention and the linear layers only.

eager, inductor   the ops of `jet_export.kernels`, which update the states in place; in inductor a JetBlock's writes the
                  codes that an FP8 o_proj multiplies
onnx              nodes of an ONNX graph, states in and states out (onnx_nodes.py)

and what its linear layers are (linear.py):

library   PyTorch's
fast      PyTorch's, FP8 products summed by fast accumulation (fp8.py)
gemv      jet::gemv: the graph always gets one token
fused     jet::gemv that takes norms, activations, quantisation and residuals in
skinny    jet::skinny_linear and its kin: the graph gets at most skinny_gemm.MAX_ROWS tokens
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

Mode = Literal["eager", "inductor", "onnx"]
Linears = Literal["library", "fast", "gemv", "fused", "skinny"]
_mode: Mode = "eager"
_linears: Linears = "library"
_states_out: list[Tensor] = []


@contextmanager
def graph_mode(mode: Mode, linears: Linears = "library") -> Iterator[list[Tensor]]:
    """Trace for `mode` inside the block. Yields the list that onnx nodes append their states to, in the order of
    cache.state_specs. One thread at a time."""
    global _mode, _states_out, _linears
    before = _mode, _states_out, _linears
    _mode, _states_out, _linears = mode, [], linears
    try:
        yield _states_out
    finally:
        _mode, _states_out, _linears = before


def onnx_mode() -> bool:
    return _mode == "onnx"


def inductor_mode() -> bool:
    return _mode == "inductor"


def linears() -> Linears:
    return _linears


def keep_states(*states: Tensor) -> None:
    """Record a node's states after the step; called layer by layer."""
    _states_out.extend(states)
