"""The chunk form of the gated delta rule and its gradients in plain torch, packed, vectorised over chunks and heads.

Equations of one chunk of C tokens, per head (qn, kn as in gated_delta_rule.py; G the running sum of g; D_ij =
exp(G_i - G_j) for i >= j; S the state before the chunk, S' after it; E = diag(exp G), F = diag(exp(G_last - G))):

    A = beta (kn kn^T) D, strictly lower;   X = (I + A)^-1;   P = (qn kn^T) D
    v_new = X beta (v - E kn S);   o = E qn S + P v_new;   S' = exp(G_last) S + (F kn)^T v_new

Backwards, from do and dS' (the gradient at the chunk's end):

    dv_new = P^T do + F kn dS';   dy = X^T dv_new;   dv = beta dy;   dS = exp(G_last) dS' + (E qn)^T do - (E kn)^T dv
    dP = do v_new^T, lower;   dA = -dy v_new^T, strictly lower;   B = beta dA D
    dqn = E do S^T + (dP D) kn;   dkn = F v_new dS'^T - E dv S^T + (dP D)^T qn + (B + B^T) kn
    dbeta = sum_v dy v - sum_k E kn (dy S^T) + sum_j dA (kn kn^T) D
    dG_i = sum_j (dP P + dA A)_ij - sum_j (dP P + dA A)_ji + E qn . do S^T - E kn . dv S^T - F kn . v_new dS'^T
    dG_last = sum F kn . v_new dS'^T + exp(G_last) <S, dS'>;   dg_i = dG_last + sum_{j >= i} dG_j

dA needs no gradient of the inverse: v_new = X y gives dX = dv_new y^T, hence -X^T dX X^T = -dy v_new^T.
A CPU trains with this; the kernels of gated_delta_rule_backward.py are held against it. `mma_dtype` rounds the operands
that those round, for a comparison at equal roundings.
Source: derived from arXiv 2412.06464, section 3; no gradients are given there.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.kernels.common import acc_dtype

L2_EPS = 1e-6
CHUNK_SIZE = 64


def in_plain_torch(x: Tensor) -> bool:
    """Whether plain torch computes on x in training: on a CPU, and in fp64, for which there are no kernels."""
    return x.device.type == "cpu" or x.dtype == torch.float64


@dataclass(frozen=True)
class Chunks:
    """Where packed sequences lie in chunks of C tokens; the last chunk of each sequence may be partly filled."""

    token: Tensor  # [M, C] int64: the token at each place; 0 where there is none
    inside: Tensor  # [M, C] bool
    steps: list[tuple[Tensor, Tensor]]  # of each step of the scan: sequences that have such a chunk, and its number

    @classmethod
    def of(cls, cu_seqlens: Tensor, chunk_size: int = CHUNK_SIZE) -> Chunks:
        bounds = cu_seqlens.tolist()
        counts = [-(-(end - begin) // chunk_size) for begin, end in itertools.pairwise(bounds)]
        starts = [
            (begin + c * chunk_size, end)
            for (begin, end), count in zip(itertools.pairwise(bounds), counts, strict=True)
            for c in range(count)
        ]
        device = cu_seqlens.device
        first, end = torch.tensor(starts, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        token = first[:, None] + torch.arange(chunk_size, device=device)
        inside = token < end[:, None]
        number = [0, *itertools.accumulate(counts)]
        steps = []
        for c in range(max(counts, default=0)):
            having = [n for n, count in enumerate(counts) if count > c]
            ids = torch.tensor([having, [number[n] + c for n in having]], device=device)
            steps.append((ids[0], ids[1]))
        return cls(torch.where(inside, token, 0), inside, steps)

    def pack(self, x: Tensor) -> Tensor:
        """[T, H, ...] -> [M, H, C, ...], zero where there is no token."""
        inside = self.inside.view(*self.inside.shape, *[1] * (x.dim() - 1))
        return torch.where(inside, x[self.token], torch.zeros((), dtype=x.dtype, device=x.device)).movedim(2, 1)

    def unpack(self, x: Tensor, num_tokens: int) -> Tensor:
        """[M, H, C, ...] -> [T, H, ...]"""
        x = x.movedim(1, 2)
        out = x.new_zeros(num_tokens, *x.shape[2:])
        out[self.token[self.inside]] = x[self.inside]
        return out


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


@dataclass(frozen=True)
class Rule:
    """A forward pass and what its gradients need. Chunked: [M, H, C, ...]; `states` [M, H, K, V] before each chunk."""

    chunks: Chunks
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    G: Tensor
    decay: Tensor
    inverse: Tensor
    attn: Tensor
    v_new: Tensor
    states: Tensor
    o: Tensor  # [T, H, V]
    final_state: Tensor  # [N, H, K, V]


def silu_gradient(x: Tensor, dy: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return dy * sigmoid * (1 + x * (1 - sigmoid))


def normalised(x: Tensor, l2: bool, silu: bool) -> Tensor:
    x = F.silu(x) if silu else x
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS) if l2 else x


def normalised_gradient(x: Tensor, dy: Tensor, l2: bool, silu: bool) -> Tensor:
    """Of `normalised`: with y = x r, r = 1 / |x|, dx = r (dy - y (y . dy))."""
    raw, x = x, F.silu(x) if silu else x
    if l2:
        r = torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
        y = x * r
        dy = r * (dy - y * (y * dy).sum(-1, keepdim=True))
    return silu_gradient(raw, dy) if silu else dy


def delta_rule_forward(
    q: Tensor,  # [T, H, K]
    k: Tensor,  # [T, H, K]
    v: Tensor,  # [T, H, V]
    beta: Tensor,  # [T, H]
    g: Tensor,  # [T, H]
    cu_seqlens: Tensor,  # [N+1]
    initial_state: Tensor | None = None,  # [N, H, K, V]
    *,
    l2: bool = True,
    silu: bool = False,
    chunk_size: int = CHUNK_SIZE,
    mma_dtype: torch.dtype | None = None,
) -> Rule:
    """In fp32 (fp64 for fp64 inputs). `silu`: q and k come before their SiLU; `l2`: they are normalised here."""
    acc, K, V = acc_dtype(q.dtype), q.shape[2], v.shape[2]
    low = functools.partial(rounded, dtype=mma_dtype)
    chunks = Chunks.of(cu_seqlens, chunk_size)
    kn = low(chunks.pack(normalised(k.to(acc), l2, silu)))
    qn = chunks.pack(normalised(q.to(acc), l2, silu) * K**-0.5)
    vs, betas, G = chunks.pack(v.to(acc)), chunks.pack(beta.to(acc)), chunks.pack(g.to(acc)).cumsum(-1)
    C = chunk_size
    below = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    # exp(G_i - G_j) only where i >= j: exp(-G_j) alone overflows
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(~below, float("-inf")).exp()
    A = (betas[..., None] * (kn @ kn.mT) * decay).tril(-1)
    eye = torch.eye(C, dtype=acc, device=q.device)
    inverse = low(torch.linalg.solve_triangular(A + eye, eye, upper=False, unitriangular=True))
    attn = low((low(qn) @ kn.mT) * decay)
    E, keep = G.exp()[..., None], G[..., -1].exp()[..., None, None]
    q_in, k_out = low(qn * E), (G[..., -1:] - G).exp()[..., None]
    N, H = cu_seqlens.shape[0] - 1, q.shape[1]
    state = (
        q.new_zeros(N, H, K, V, dtype=acc) if initial_state is None else initial_state.to(acc, copy=True).contiguous()
    )
    states, v_new, o = state.new_empty(len(kn), H, K, V), torch.empty_like(vs), torch.empty_like(vs)
    for sequences, i in chunks.steps:
        S = state[sequences]
        y = low(betas[i][..., None] * (vs[i] - E[i] * (kn[i] @ low(S))))
        new = inverse[i] @ y
        o[i] = q_in[i] @ low(S) + attn[i] @ low(new)
        states[i], v_new[i] = S, new
        state[sequences] = keep[i] * S + kn[i].mT @ low(k_out[i] * new)
    return Rule(chunks, qn, kn, vs, betas, G, decay, inverse, attn, v_new, states, chunks.unpack(o, len(q)), state)


@dataclass(frozen=True)
class RuleGradients:
    q: Tensor  # [T, H, K]
    k: Tensor  # [T, H, K]
    v: Tensor  # [T, H, V]
    beta: Tensor  # [T, H]
    g: Tensor  # [T, H]
    initial_state: Tensor  # [N, H, K, V]


def delta_rule_backward(
    rule: Rule,
    q: Tensor,  # [T, H, K]
    k: Tensor,  # [T, H, K]
    do: Tensor,  # [T, H, V]
    d_final: Tensor | None,  # [N, H, K, V]
    *,
    l2: bool = True,
    silu: bool = False,
    mma_dtype: torch.dtype | None = None,
) -> RuleGradients:
    """Gradients of o and final_state of `delta_rule_forward` with the same inputs, in its dtype."""
    r, acc, T, K = rule, rule.o.dtype, len(q), q.shape[2]
    low = functools.partial(rounded, dtype=mma_dtype)
    dos = r.chunks.pack(do.to(acc))
    E, beta = r.G.exp()[..., None], r.beta[..., None]
    out, keep = (r.G[..., -1:] - r.G).exp()[..., None], r.G[..., -1].exp()[..., None, None]
    d_state = torch.zeros_like(r.final_state) if d_final is None else d_final.to(acc, copy=True).contiguous()
    d_states, dy = torch.empty_like(r.states), torch.empty_like(r.v_new)  # d_states: after each chunk
    for sequences, i in reversed(r.chunks.steps):
        dS = d_states[i] = d_state[sequences]
        dv_new = r.attn[i].mT @ dos[i] + out[i] * (r.k[i] @ low(dS))
        dy[i] = r.inverse[i].mT @ low(dv_new)
        d_kS = low(E[i] * beta[i] * dy[i])
        d_state[sequences] = keep[i] * dS + low(r.q[i] * E[i]).mT @ dos[i] - r.k[i].mT @ d_kS

    S, d_S, v_new, low_dy = low(r.states), low(d_states), low(r.v_new), low(dy)
    do_S, dy_S, v_dS = dos @ S.mT, low_dy @ S.mT, v_new @ d_S.mT  # [M, H, C, K]
    dP = (dos @ v_new.mT) * r.decay
    dA = -(low_dy @ v_new.mT).tril(-1) * r.decay
    kk = r.k @ r.k.mT
    B = low(beta * dA)
    d_qn = E * do_S + low(dP) @ r.k
    d_kn = out * v_dS - E * beta * dy_S + low(dP).mT @ low(r.q) + (B + B.mT) @ r.k
    k_dy_S = (E * r.k * dy_S).sum(-1)
    d_beta = (low_dy * r.v).sum(-1) - k_dy_S + (dA * kk).sum(-1)
    leaving = (out * r.k * v_dS).sum(-1)
    pairs = dP * (low(r.q) @ r.k.mT) + beta * dA * kk
    d_G = pairs.sum(-1) - pairs.sum(-2) + (E * r.q * do_S).sum(-1) - r.beta * k_dy_S - leaving
    d_last = leaving.sum(-1) + keep[..., 0, 0] * (S * d_S).sum((-2, -1))
    dg = d_last[..., None] + d_G.flip(-1).cumsum(-1).flip(-1)
    d_q = normalised_gradient(q.to(acc), r.chunks.unpack(d_qn, T) * K**-0.5, l2, silu)
    d_k = normalised_gradient(k.to(acc), r.chunks.unpack(d_kn, T), l2, silu)
    d_v, d_beta, dg = (r.chunks.unpack(x, T) for x in (beta * dy, d_beta, dg))
    return RuleGradients(d_q, d_k, d_v, d_beta, dg, d_state)
