"""The gated delta rule of packed sequences with gradients, for training. Equations: gated_delta_rule_torch.py.

Saved for the backward pass are the inputs alone. On a GPU it recomputes the chunks' operands and states; see
gated_delta_rule_backward.py for what it holds meanwhile. On a CPU both passes are the chunk form in plain torch.
An opaque op with registered gradients: torch.compile keeps its graph whole, torch.utils.checkpoint works. No gradient
of a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jet_export.kernels.common import acc_dtype, rows
from jet_export.kernels.gated_delta_rule_backward import Inputs, delta_rule_backward_triton
from jet_export.kernels.gated_delta_rule_torch import delta_rule_backward, delta_rule_forward, in_plain_torch
from jet_export.kernels.gated_delta_rule_train_chunk import prepare, scan
from jet_export.utils.errors import JetExportError


def check_bounds(cu_seqlens: Tensor, num_tokens: int, name: str) -> None:
    """Raises JetExportError unless cu_seqlens, on a CPU, starts at 0, never falls and ends at the tokens there are."""
    if cu_seqlens.device.type != "cpu":
        return  # reading it would wait for the GPU
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise JetExportError(
            f"{name}: cu_seqlens runs {bounds[0]} ... {bounds[-1]} over {num_tokens} tokens.",
            "It starts at 0, never falls and ends at the number of tokens; make padding a sequence of its own.",
        )


def rule_forward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    l2: bool,
) -> tuple[Tensor, Tensor]:
    """Launches the kernels: o in q's dtype, final_state in fp32."""
    x = prepare(rows(q), rows(k), beta, g, cu_seqlens, v.shape[2], l2=l2, silu=False, keep=False)
    scanned = scan(x, rows(v), cu_seqlens, initial_state, output=True, keep=False)
    return scanned.o, scanned.final_state


def rule_backward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    l2: bool,
    do: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernels: dq, dk, dv, dbeta, dg in their inputs' dtypes, d_initial in fp32 (empty where there is no
    initial_state)."""
    q, k, v = rows(q), rows(k), rows(v)
    x = prepare(q, k, beta, g, cu_seqlens, v.shape[2], l2=l2, silu=False, keep=True)
    scanned = scan(x, v, cu_seqlens, initial_state, output=False, keep=True)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    inputs = Inputs(q, k, v, cu_seqlens, l2, silu=False)
    needs_initial = initial_state is not None
    dv, dbeta, dg, d_initial = delta_rule_backward_triton(inputs, x, scanned, rows(do), d_final, dq, dk, needs_initial)
    return dq, dk, dv, dbeta.to(beta.dtype), dg.to(g.dtype), d_initial


@torch.library.custom_op("jet::gated_delta_rule_train", mutates_args=())
def gated_delta_rule_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    l2: bool,
) -> tuple[Tensor, Tensor]:
    if not in_plain_torch(q):
        return rule_forward_triton(q, k, v, beta, g, cu_seqlens, initial_state, l2)
    check_bounds(cu_seqlens, len(q), "gated_delta_rule_train")
    rule = delta_rule_forward(q, k, v, beta, g, cu_seqlens, initial_state, l2=l2)
    return rule.o.to(v.dtype).contiguous(), rule.final_state


@gated_delta_rule_op.register_fake
def _(q, k, v, beta, g, cu_seqlens, initial_state, l2):
    state = (cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    return v.new_empty(v.shape), v.new_empty(state, dtype=acc_dtype(q.dtype))


@torch.library.custom_op("jet::gated_delta_rule_backward", mutates_args=())
def gated_delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    l2: bool,
    do: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not in_plain_torch(q):
        return rule_backward_triton(q, k, v, beta, g, cu_seqlens, initial_state, l2, do, d_final)
    rule = delta_rule_forward(q, k, v, beta, g, cu_seqlens, initial_state, l2=l2)
    d = delta_rule_backward(rule, q, k, do, d_final, l2=l2)
    pairs = (d.q, q), (d.k, k), (d.v, v), (d.beta, beta), (d.g, g)
    dq, dk, dv, dbeta, dg = (x.to(like.dtype).contiguous() for x, like in pairs)
    return dq, dk, dv, dbeta, dg, d.initial_state if initial_state is not None else d.initial_state.new_empty(0)


@gated_delta_rule_backward.register_fake
def _(q, k, v, beta, g, cu_seqlens, initial_state, l2, do, d_final):
    state = 0 if initial_state is None else initial_state.shape
    return *(x.new_empty(x.shape) for x in (q, k, v, beta, g)), q.new_empty(state, dtype=acc_dtype(q.dtype))


def _save(ctx, inputs, output):
    *tensors, ctx.l2 = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do, d_final):
    saved = ctx.saved_tensors  # once: under checkpointing each access would be a recomputation
    *grads, d_initial = gated_delta_rule_backward(*saved, ctx.l2, do, d_final)
    return *grads, None, None if saved[-1] is None else d_initial.to(saved[-1].dtype), None


gated_delta_rule_op.register_autograd(_backward, setup_context=_save)


def gated_delta_rule_train(
    q: Tensor,  # [T, H, K]
    k: Tensor,  # [T, H, K]
    v: Tensor,  # [T, H, V]
    beta: Tensor,  # [T, H]
    g: Tensor | None,  # [T, H] natural-log decay (<= 0); None: no decay, as DeltaNet has it
    cu_seqlens: Tensor,  # [N+1] int32, from 0 to T
    initial_state: Tensor | None = None,  # [N, H, K, V]; None: zero
    *,
    l2: bool = True,
) -> tuple[Tensor, Tensor]:  # o [T, H, V] in v's dtype, final_state [N, H, K, V] fp32
    """Differentiable in every floating-point input. `l2`: q and k are normalised here; q is scaled by K^-0.5 anyway.

    Raises JetExportError for shapes that do not fit each other."""
    T, H, K = q.shape
    if k.shape != q.shape or v.shape[:2] != (T, H) or beta.shape != (T, H) or (g is not None and g.shape != (T, H)):
        shapes = ", ".join(
            f"{n} {tuple(x.shape)}" for n, x in dict(q=q, k=k, v=v, beta=beta, g=g).items() if x is not None
        )
        raise JetExportError(
            f"gated_delta_rule_train: {shapes}.",
            "q, k: [T, H, K]; v: [T, H, V]; beta, g: [T, H]; without a batch axis.",
        )
    if not q.dtype == k.dtype == v.dtype:
        raise JetExportError(f"gated_delta_rule_train: q, k and v are {q.dtype}, {k.dtype}, {v.dtype}.", "One dtype.")
    state = (cu_seqlens.shape[0] - 1, H, K, v.shape[2])
    if initial_state is not None and initial_state.shape != state:
        raise JetExportError(
            f"gated_delta_rule_train: initial_state {tuple(initial_state.shape)}.", f"It is [N, H, K, V], here {state}."
        )
    if g is None:
        g = torch.zeros(T, H, dtype=acc_dtype(q.dtype), device=q.device)
    return gated_delta_rule_op(q, k, v, beta, g, cu_seqlens, initial_state, l2)
