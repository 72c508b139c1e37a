"""Linear attention with a decay a channel and a rank-one erasure, of packed sequences, in differentiable torch.

Per head, state S [K, V], with w = exp(g) [K] (g <= 0) and erasure b c^T [K, K]:

    S_t = diag(w_t) S_{t-1} + b_t (S_{t-1}^T c_t)^T + k_t v_t^T;   o_t = S_t^T q_t

b = 0 is gated linear attention (GLA; one decay a head: Mamba-2, and with a fixed one RetNet). b = -beta k, c = w k with
k_t = beta k is KDA (decay before the delta rule); b = -a kappa, c = kappa is RWKV-7. KDA with one decay a head is the
gated delta rule, which has an op of its own.

In chunks of C tokens, G the running sum of g, r_t = S_{t-1}^T c_t, S the state before the chunk:
    (I - M) r = (c exp(G_{t-1})) S + N v,   M_ij = <c_i exp(G_{i-1} - G_j), b_j>, N the same with k, j < i
    o_i = (q_i exp(G_i)) S + sum_{j <= i} <q_i exp(G_i - G_j), b_j> r_j + <q_i exp(G_i - G_j), k_j> v_j
    S' = exp(G_C) S + sum_j (b_j exp(G_C - G_j)) r_j^T + (k_j exp(G_C - G_j)) v_j^T
No exponent is positive. The differences are formed for each channel, [C, C, K] a head: slow, and exact. A yardstick for
losses; not a kernel, and its speed says nothing of these blocks' own kernels.
Sources: arXiv 2312.06635 (GLA), 2307.08621 (RetNet), 2405.21060 (Mamba-2), 2510.26692 (KDA), 2503.14456 (RWKV-7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from jet_export.kernels.gated_delta_rule_torch import Chunks

CHUNK_SIZE = 16


def linear_recurrence_ref(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor | None, c: Tensor | None, cu_seqlens: Tensor
) -> Tensor:
    """The specification: a token at a time, in q's dtype. Shapes as `linear_recurrence`."""
    starts = set(cu_seqlens.tolist())
    o, S = [], q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
    for t in range(len(q)):
        S = torch.zeros_like(S) if t in starts else S
        new = g[t].exp()[..., None] * S + k[t, :, :, None] * v[t, :, None]
        if b is not None and c is not None:
            new = new + b[t, :, :, None] * (c[t, :, None] @ S)
        S = new
        o.append((q[t, :, None] @ S)[:, 0])
    return torch.stack(o)


def linear_recurrence(
    q: Tensor,  # [T, H, K]
    k: Tensor,  # [T, H, K]
    v: Tensor,  # [T, H, V]
    g: Tensor,  # [T, H, K] natural-log decay (<= 0)
    b: Tensor | None,  # [T, H, K]; None: no erasure
    c: Tensor | None,  # [T, H, K]
    cu_seqlens: Tensor,  # [N+1] int32, from 0 to T
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:  # o [T, H, V]
    """Differentiable; computed in fp32 (fp64 for fp64 inputs), also in autocast, and returned so."""
    with torch.autocast(q.device.type, enabled=False):
        o: Tensor = _chunked(q, k, v, g, b, c, cu_seqlens, chunk_size)
        return o


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its chunks depend on the batch
def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    cu_seqlens: Tensor,
    chunk_size: int,
) -> Tensor:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    chunks = Chunks.of(cu_seqlens, chunk_size)
    qs, ks, vs, G = (chunks.pack(x.to(acc)) for x in (q, k, v, g))  # [M, H, C, .]
    step, G = G, G.cumsum(2)
    below = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).tril()[..., None]
    since = (G[:, :, :, None] - G[:, :, None]).masked_fill(~below, float("-inf")).exp()  # [M, H, C, C, K]
    q_k = torch.einsum("mhik,mhijk,mhjk->mhij", qs, since, ks)
    out, last = (G[:, :, -1:] - G).exp(), G[:, :, -1].exp()[..., None]
    q_in, k_out = qs * G.exp(), ks * out
    erases = b is not None and c is not None
    if b is not None and c is not None:
        bs, cs = chunks.pack(b.to(acc)), chunks.pack(c.to(acc))
        strictly = below & ~torch.eye(chunk_size, dtype=torch.bool, device=q.device)[..., None]
        before = (G - step)[:, :, :, None] - G[:, :, None]  # G_{i-1} - G_j
        before = before.masked_fill(~strictly, float("-inf")).exp()
        c_b = torch.einsum("mhik,mhijk,mhjk->mhij", cs, before, bs)
        c_k = torch.einsum("mhik,mhijk,mhjk->mhij", cs, before, ks)
        q_b = torch.einsum("mhik,mhijk,mhjk->mhij", qs, since, bs)
        c_in, b_out = cs * (G - step).exp(), bs * out
        system = torch.eye(chunk_size, dtype=acc, device=q.device) - c_b
    N, (_, H, K), V = len(cu_seqlens) - 1, q.shape, v.shape[2]
    state = torch.zeros(N, H, K, V, dtype=acc, device=q.device)
    o: list[Tensor] = []
    for sequences, i in chunks.steps:
        S = state[sequences]
        o_i = q_in[i] @ S + q_k[i] @ vs[i]
        new = last[i] * S + k_out[i].mT @ vs[i]
        if erases:
            r = torch.linalg.solve_triangular(system[i], c_in[i] @ S + c_k[i] @ vs[i], upper=False, unitriangular=True)
            o_i, new = o_i + q_b[i] @ r, new + b_out[i].mT @ r
        o.append(o_i)
        state = state.index_put((sequences,), new)
    order = torch.cat([i for _, i in chunks.steps]).argsort()
    return chunks.unpack(torch.cat(o)[order], len(q))
