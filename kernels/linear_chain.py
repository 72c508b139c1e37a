"""The linear layers of one token between two mixers in one launch: a mixer's output projection, the MLP, and the next
mixer's input projections.

    h1 = h + W_o a                                   a: the mixer's output
    m  = silu(W_gate n1) * (W_up n1)                 n1 = RMS(h1) norm1
    h2 = h1 + W_down m
    y  = W_in n2 + b_in,  z = W_small n2             n2 = RMS(h2) norm2
    k  = W_generator silu(y[-R:]) + b_generator      R: its inputs

Each as gemv.py defines it, with the same roundings. As launches of their own these layers wait for each other some 4 us
each, more than most of them need to read their weights. Here all programs run at the same time, have the first weights
of the next layer in registers before they wait for each other at a barrier, and ask L2 for the rest.
All programs of the grid must be resident: `programs` of configs.json must fit the GPU, and no other grid that waits for
its own programs may run beside this one.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from jet_export.kernels.common import INTERPRET, gdc, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.gemv import FP8, gemv_ref
from jet_export.kernels.linear_chain_kernel import linear_chain_kernel

OUT, GATE_UP, DOWN, IN, SMALL, GENERATOR = range(6)  # the layers, in the order of `weights`


def linear_chain_ref(
    x: Tensor,  # [1, K], the mixer's output, model dtype
    residual: Tensor,  # [1, D]
    weights: Sequence[Tensor],  # of OUT, GATE_UP, DOWN, IN, SMALL, GENERATOR; the last one or two may be left out
    x_scales: Sequence[Tensor | None],  # [1] each, of layers in FP8
    w_scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    norms: Sequence[Tensor],  # [D] two
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # h2 [1, D], y [1, N], z and k [1, n], or [0] where their layer is left out
    """The specification."""
    dtype = residual.dtype

    def linear(i: int, a: Tensor, norm: Tensor | None = None, add: Tensor | None = None, **what: bool) -> Tensor:
        y_scale = x_scales[DOWN] if i == GATE_UP else None
        kinds = (what.get("silu", False), what.get("gated", False))
        return gemv_ref(a, weights[i], x_scales[i], w_scales[i], biases[i], norm, add, y_scale, norm_eps, *kinds, dtype)

    h1 = linear(OUT, x, add=residual)
    h2 = linear(DOWN, linear(GATE_UP, h1, norms[0], gated=True), add=h1)
    y = linear(IN, h2, norms[1])
    z = linear(SMALL, h2, norms[1]) if len(weights) > SMALL else residual.new_empty(0)
    if len(weights) <= GENERATOR:
        return h2, y, z, residual.new_empty(0)
    R = weights[GENERATOR].shape[1]
    return h2, y, z, linear(GENERATOR, y[:, -R:], silu=True)


def linear_chain_triton(
    x: Tensor,
    residual: Tensor,
    weights: Sequence[Tensor],
    x_scales: Sequence[Tensor | None],
    w_scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    norms: Sequence[Tensor],
    barrier: Tensor,  # [1] int32, zero; what it holds afterwards means nothing
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernel; arguments as `linear_chain_ref`, contiguous. Its results, and the barrier of the next call:
    a launch that only clears one would take as long as a small layer."""
    use = lookup("linear_chain", dtype=weights[GATE_UP].dtype, hidden_size=residual.shape[1])
    resident = use.pop("programs")
    programs = 1 if INTERPRET else resident  # the interpreter runs one program after the other
    (D, D_O), D_M = weights[OUT].shape, weights[DOWN].shape[1]
    use["AHEAD"] = min(use["AHEAD"], triton.cdiv(min(D_O, D_M), use["BK"]))
    N_IN = weights[IN].shape[0]
    N_SMALL = weights[SMALL].shape[0] if len(weights) > SMALL else 0
    N_GEN, R = weights[GENERATOR].shape if len(weights) > GENERATOR else (0, 16)
    fp8 = [scale is not None for scale in x_scales]
    biased = [bias is not None for bias in biases]
    h1, h2 = torch.empty_like(residual), torch.empty_like(residual)
    m = x.new_empty(1, D_M, dtype=FP8 if fp8[DOWN] else residual.dtype)
    y, z, k = (residual.new_empty((1, n) if n else (0,)) for n in (N_IN, N_SMALL, N_GEN))
    next_barrier = torch.empty_like(barrier)

    def given(tensors: Sequence[Tensor | None], i: int) -> Tensor:
        tensor = tensors[i] if i < len(tensors) else None
        return x if tensor is None else tensor

    def of(i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return given(weights, i), given(x_scales, i), given(w_scales, i), given(biases, i)

    wrap(linear_chain_kernel)[(programs,)](
        x, residual, *of(OUT), norms[0], *of(GATE_UP), *of(DOWN), norms[1], *of(IN), given(weights, SMALL),
        given(biases, SMALL), *of(GENERATOR), h1, m, h2, y, z, k, barrier, next_barrier, norm_eps,
        D_O=D_O, D=D, D_M=D_M, N_IN=N_IN, N_SMALL=N_SMALL, N_GEN=N_GEN, R=R, OUT_FP8=fp8[OUT], UP_FP8=fp8[GATE_UP],
        DOWN_FP8=fp8[DOWN], IN_FP8=fp8[IN], GEN_FP8=bool(N_GEN) and fp8[GENERATOR], OUT_BIASED=biased[OUT],
        UP_BIASED=biased[GATE_UP], DOWN_BIASED=biased[DOWN], IN_BIASED=biased[IN],
        SMALL_BIASED=bool(N_SMALL) and biased[SMALL], GEN_BIASED=bool(N_GEN) and biased[GENERATOR],
        GDC=gdc(), ASK=gdc(), **use,
    )  # fmt: skip
    return h2, y, z, k, next_barrier


@torch.library.custom_op("jet::linear_chain_cpu", mutates_args=())
def linear_chain_cpu(
    x: Tensor,
    residual: Tensor,
    weights: list[Tensor],
    x_scales: list[Tensor | None],
    w_scales: list[Tensor | None],
    biases: list[Tensor | None],
    norms: list[Tensor],
    barrier: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = linear_chain_ref(x, residual, weights, x_scales, w_scales, biases, norms, norm_eps)
    return *out, torch.zeros_like(barrier)


@linear_chain_cpu.register_fake
def _(x, residual, weights, x_scales, w_scales, biases, norms, barrier, norm_eps):
    widths = [w.shape[0] for w in weights[IN:]]
    y, z, k = (residual.new_empty((1, n) if n else (0,)) for n in (*widths, 0, 0)[:3])
    return torch.empty_like(residual), y, z, k, torch.empty_like(barrier)


@torch.library.triton_op("jet::linear_chain", mutates_args=("barrier",))
def linear_chain(
    x: Tensor,
    residual: Tensor,
    weights: list[Tensor],
    x_scales: list[Tensor | None],
    w_scales: list[Tensor | None],
    biases: list[Tensor | None],
    norms: list[Tensor],
    barrier: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h2, y, z, k and the next barrier; arguments as `linear_chain_triton`, see the module's equations."""
    if x.device.type == "cpu":
        return torch.ops.jet.linear_chain_cpu(
            x, residual, weights, x_scales, w_scales, biases, norms, barrier, norm_eps
        )
    return linear_chain_triton(
        x.contiguous(), residual.contiguous(), weights, x_scales, w_scales, biases, norms, barrier, norm_eps
    )
