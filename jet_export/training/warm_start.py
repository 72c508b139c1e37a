"""Warm start: a JetBlock's q, k, v and o from those of the attention that it replaces. An option to compare:
the block puts a SiLU and a norm on q and k, no RoPE, a convolution on v and a gate on its output.

H heads of K keys and V values meet Hq query heads and Hkv key heads of Dh: student head h takes query head h * Hq // H
and the key and value head of its group.

repeat  rows of q and k: the first K of Dh, or all of them again and again; v likewise to V, with o's columns divided by
        how often a row was repeated, so that o v keeps the teacher's product
svd     of the head's products Wq^T Wk and Wo Wv, which are all that attention without RoPE depends on, the nearest of
        rank K and V: (A, B) with A^T B = U_K S_K V_K^T, the singular values shared evenly. Ranks above Dh stay random
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jet_export.model.jet_nemotron import Attention, JetBlock


@torch.no_grad()
def warm_start(block: JetBlock, source: nn.Module, how: str) -> None:
    """`how`: random leaves the block as it is; repeat and svd are described above."""
    if how == "random":
        return
    assert isinstance(source, Attention)
    H, K, V = block.num_heads, block.head_k_dim, block.head_v_dim
    Hq, Hkv, Dh = source.num_heads, source.num_kv_heads, source.head_dim
    q, k, v = torch.split(source.qkv_proj.weight.float(), [Hq * Dh, Hkv * Dh, Hkv * Dh])  # [heads * Dh, hidden]
    o = source.o_proj.weight.float()  # [hidden, Hq * Dh]
    own_q, own_k, own_v = torch.split(block.in_proj.weight[: 2 * H * K + H * V], [H * K, H * K, H * V])
    for h in range(H):
        i = h * Hq // H
        j = i * Hkv // Hq
        share = sum(1 for other in range(H) if other * Hq // H == i)  # student heads that take this query head
        head_q, head_k, head_v = (w[n * Dh : (n + 1) * Dh] for w, n in ((q, i), (k, j), (v, j)))
        head_o = o[:, i * Dh : (i + 1) * Dh] / share
        rows_k, rows_v = slice(h * K, (h + 1) * K), slice(h * V, (h + 1) * V)
        if how == "repeat":
            at_k, at_v = (torch.arange(n, device=o.device) % Dh for n in (K, V))
            times = torch.bincount(at_v, minlength=Dh)[at_v]
            new = head_q[at_k], head_k[at_k], head_v[at_v], (head_o[:, at_v] / times).mT
        else:
            new = (*low_rank(head_q, head_k, K), *low_rank(head_o.mT, head_v, V)[::-1])
        for target, rows, value in ((own_q, rows_k, new[0]), (own_k, rows_k, new[1]), (own_v, rows_v, new[2])):
            target[rows][: len(value)] = value
        block.o_proj.weight[:, rows_v][:, : len(new[3])] = new[3].mT


def low_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """a, b [D, hidden] -> [r, hidden] each, r = min(rank, D), whose a^T b is the nearest of that rank to the given."""
    qa, ra = torch.linalg.qr(a.mT)  # [hidden, D], [D, D]
    qb, rb = torch.linalg.qr(b.mT)
    u, s, vt = torch.linalg.svd(ra @ rb.mT)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    return (qa @ (u[:, :r] * root)).mT, (qb @ (vt[:r].mT * root)).mT
