"""The chunk form of the gated delta rule in plain torch, rounded to 16 bits where the kernels round."""

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.kernels.gated_delta_rule import l2norm


def rounded_chunk(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor, dtype: torch.dtype, C: int = 64
) -> tuple[Tensor, Tensor]:
    """One sequence, q, k [T, H, K] (not normalised), v [T, H, V] -> o [T, H, V], state [H, K, V]; all fp32."""
    T, K = q.shape[0], q.shape[-1]

    def r(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    def chunks(x: Tensor) -> Tensor:
        return F.pad(x.float(), [0, 0] * (x.dim() - 1) + [0, -T % C]).unflatten(0, (-1, C)).movedim(2, 1)

    q, k, v, beta, G = chunks(q), chunks(k), chunks(v), chunks(beta), chunks(g).cumsum(-1)  # [NC, H, C, ...]
    q, k = l2norm(q) * K**-0.5, l2norm(k)
    q_in, q, k = r(q * G.exp()[..., None]), r(q), r(k)
    decay_in, decay_out = G.exp()[..., None], (G[..., -1:] - G).exp()[..., None]
    below = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(~below, float("-inf")).exp()
    attn = r(q @ k.mT * decay)
    A = (k @ k.mT * decay * beta[..., None]).tril(-1)
    eye = torch.eye(C, device=q.device).expand_as(A)
    X = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True) * beta[..., None, :]
    X, v = r(X), r(v)
    S, o = S.float(), []
    for c in range(q.shape[0]):
        v_new = X[c] @ v[c] - X[c] @ r(decay_in[c] * (k[c] @ r(S)))
        o.append(r(q_in[c] @ r(S) + attn[c] @ r(v_new)))
        S = G[c, :, -1, None, None].exp() * S + k[c].mT @ r(decay_out[c] * v_new)
    return torch.stack(o).movedim(1, 2).flatten(0, 1)[:T], S
