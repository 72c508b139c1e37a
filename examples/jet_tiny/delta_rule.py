"""The gated delta rule in a form that trains: parallel over chunks of C tokens, differentiable, plain torch.

Per head, with state [K, V], natural-log decay g and write strength beta (Gated DeltaNet, arXiv 2412.06464):
    state_t = exp(g_t) state_{t-1} + k_t delta_t^T,   o_t = state_t^T q_t
    delta_t = beta_t (v_t - exp(g_t) state_{t-1}^T k_t)
Within a chunk, with G = cumsum(g) and D_ij = exp(G_i - G_j) for i >= j:
    A = tril(beta k k^T * D, -1),   inverse = (I + A)^-1,   U = inverse (beta v),   W = inverse (beta exp(G) k)
    delta = U - W state,   o = (exp(G) q) state + (q k^T * D) delta
    state' = exp(G_C) state + (exp(G_C - G) k)^T delta
state' is affine in the state: state' = M state + B with M = exp(G_C) I - (exp(G_C - G) k)^T W and
B = (exp(G_C - G) k)^T U. Only this recurrence runs chunk by chunk, everything else for all chunks at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def delta_rule_recurrent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """Token by token, as written above: the specification. q, k [B, H, T, K]; v [B, H, T, V]; beta, g [B, H, T]."""
    state = v.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[2]):
        state = state * g[:, :, t, None, None].exp()
        delta = beta[:, :, t, None] * (v[:, :, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t]))
        state = state + k[:, :, t, :, None] * delta[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outputs, 2)


class UnitLowerInverse(torch.autograd.Function):
    """X = (I + A)^-1 for strictly lower triangular A [..., C, C], C a power of two.

    Block sizes double: X_1 = I, X_2s = X_s - X_s (A * off-diagonal blocks of size s) X_s. Unlike the Neumann product
    (I - A)(I + A^2)(I + A^4)..., whose terms overflow for parallel keys, no intermediate exceeds a block's inverse.
    Backward: dA = -X^T dX X^T, strictly lower.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        size = a.shape[-1]
        i = torch.arange(size, device=a.device)
        x = torch.eye(size, device=a.device, dtype=a.dtype).expand_as(a)
        block = 1
        while block < size:
            odd_row = (i // block % 2 == 1)[:, None]
            same_pair = (i // (2 * block))[:, None] == (i // (2 * block))[None]
            even_column = (i // block % 2 == 0)[None]
            off = a * (odd_row & even_column & same_pair).to(a.dtype)
            x = x - (off if block == 1 else x @ off @ x)
            block *= 2
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -(x.mT @ grad @ x.mT).tril(-1)


class ChunkScan(torch.autograd.Function):
    """state_0 = 0, state_{c+1} = M_c state_c + B_c: m [N, C, K, K], b [N, C, K, V] -> each chunk's initial state."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, b: Tensor) -> Tensor:
        initial = [torch.zeros_like(b[:, 0])]
        for c in range(b.shape[1] - 1):
            initial.append(torch.baddbmm(b[:, c], m[:, c], initial[-1]))
        states = torch.stack(initial, 1)
        ctx.save_for_backward(m, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        m, states = ctx.saved_tensors
        carried = [torch.zeros_like(grad[:, 0])]  # gradient of the state that leaves each chunk, last chunk first
        for c in range(grad.shape[1] - 1, 0, -1):
            carried.append(torch.baddbmm(grad[:, c], m[:, c].mT, carried[-1]))
        d_b = torch.stack(carried[::-1], 1)
        return d_b @ states.mT, d_b


def delta_rule_chunked(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """As `delta_rule_recurrent`, in fp32 and from a zero state. q and k are normalised, q is scaled."""
    batch, heads, length, _ = q.shape
    pad = -length % CHUNK
    if pad:  # beta = 0 and g = 0: a padding token changes nothing
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        beta, g = F.pad(beta, (0, pad)), F.pad(g, (0, pad))
    q, k, v = (x.reshape(batch * heads, -1, CHUNK, x.shape[-1]) for x in (q, k, v))  # [N, chunks, C, .]
    beta = beta.reshape(batch * heads, -1, CHUNK, 1)
    cum = g.reshape(batch * heads, -1, CHUNK).cumsum(-1)[..., None]  # G
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (cum - cum.mT).masked_fill(~causal, float("-inf")).exp()  # D
    inverse = UnitLowerInverse.apply((beta * (k @ k.mT) * decay).tril(-1))
    u, w = inverse @ (beta * v), inverse @ (beta * cum.exp() * k)
    last = cum[:, :, -1:]
    k_last = (last - cum).exp() * k
    identity = torch.eye(k.shape[-1], device=k.device, dtype=k.dtype)
    states = ChunkScan.apply(last.exp() * identity - k_last.mT @ w, k_last.mT @ u)
    out = (cum.exp() * q) @ states + ((q @ k.mT) * decay) @ (u - w @ states)
    return out.reshape(batch, heads, length + pad, -1)[:, :, :length]
