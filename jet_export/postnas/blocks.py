"""Step 2's blocks, all with H heads of a K x V state: what differs is the rule and what stands around it.

deltanet, gdn   `gated_delta_rule_train`, without and with decay
gla, retnet, mamba2, kda, rwkv7   `recurrence.linear_recurrence`, in torch
jet             the JetBlock itself, which the student has anyway

Left out of the originals: RetNet's rotation of q and k; RWKV-7's value residual between layers; Mamba-2 normalises a
head, not all heads together. Convolutions have the JetBlock's number of taps.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jet_export.kernels.gated_delta_rule_train import gated_delta_rule_train
from jet_export.postnas.mixer import Mixer, Sizes, heads, low_rank, own_precision, rms, short_conv, unit
from jet_export.postnas.recurrence import linear_recurrence
from jet_export.training.data.rows import Batch

RANK = 16  # of decays that are made from x


class LinearBlock(Mixer):
    """Projections, a static convolution with SiLU (`has_conv`), the rule, a norm, a gate (`activation`), o."""

    has_conv, activation = True, "silu"  # or "sigmoid"; "" for none

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        (H, K, V), D = s.dims, s.dims.value_dim
        self.sizes, self.dims = s, s.dims
        self.in_proj = nn.Linear(s.hidden, 2 * H * K + D + (D if self.activation else 0), bias=False)
        if self.has_conv:
            self.conv = nn.Parameter(torch.zeros(2 * H * K + D, s.conv_size))
        self.o_norm = nn.Parameter(torch.ones(V))
        self.o_proj = nn.Linear(D, s.hidden, bias=False)

    @abstractmethod
    def rule(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """q, k [T, H, K], v [T, H, V], x [T, hidden] -> [T, H, V]."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        H, K, _ = self.dims
        D = self.dims.value_dim
        qkv, gate = torch.split(self.in_proj(x), [2 * H * K + D, D if self.activation else 0], 1)
        if self.has_conv:
            qkv = F.silu(short_conv(qkv, self.conv, batch))
        q, k, v = (heads(part, H) for part in torch.split(qkv, [H * K, H * K, D], 1))
        out: Tensor = self.o_proj(self.gated(self.rule(q, k, v, x, batch), gate).to(x.dtype))
        return out

    def gated(self, o: Tensor, gate: Tensor) -> Tensor:
        """o [T, H, V], gate [T, D or 0] -> [T, D]."""
        o = rms(o, self.sizes.norm_eps) * self.o_norm
        if self.activation:
            z = heads(gate, self.dims.num_heads).float()
            o = o * (F.silu(z) if self.activation == "silu" else z.sigmoid())
        return o.flatten(1)


class DeltaNet(LinearBlock):
    activation = ""

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.b_proj = nn.Linear(s.hidden, s.dims.num_heads, bias=False)

    def rule(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, batch: Batch) -> Tensor:
        beta = self.b_proj(x).sigmoid()
        with own_precision(x):
            o, _ = gated_delta_rule_train(q, k, v, beta, None, batch.cu_seqlens)
        return o


class HeadDecay(nn.Module):
    """g [T, H] = -exp(A_log) softplus(a + dt_bias), fp32, and softplus(...) itself."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.a_proj = nn.Linear(s.hidden, s.dims.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(s.dims.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(s.dims.num_heads))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        return -self.A_log.float().exp() * dt, dt


class GatedDeltaNet(DeltaNet):
    activation = "silu"

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.decay = HeadDecay(s)

    def rule(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, batch: Batch) -> Tensor:
        (g, _), beta = self.decay(x), self.b_proj(x).sigmoid()
        with own_precision(x):
            o, _ = gated_delta_rule_train(q, k, v, beta, g, batch.cu_seqlens)
        return o


class GLA(LinearBlock):
    has_conv = False

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.g_proj = low_rank(s.hidden, RANK, s.dims.num_heads * s.dims.head_k_dim)
        self.g_bias = nn.Parameter(torch.zeros(s.dims.num_heads * s.dims.head_k_dim))

    def rule(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, batch: Batch) -> Tensor:
        g = F.logsigmoid(self.g_proj(x).float() + self.g_bias) / 16
        scale = self.dims.head_k_dim**-0.5
        return linear_recurrence(q * scale, k, v, heads(g, self.dims.num_heads), None, None, batch.cu_seqlens)


class RetNet(LinearBlock):
    has_conv = False

    def rule(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, batch: Batch) -> Tensor:
        H, K, _ = self.dims
        g = torch.log1p(-torch.exp2(-5.0 - torch.arange(H, device=x.device, dtype=torch.float32)))
        decay = g[None, :, None].expand(len(x), H, K)
        return linear_recurrence(q * K**-0.5, k, v, decay, None, None, batch.cu_seqlens)


class Mamba2(LinearBlock):
    """q is C, k is B, shared by the heads; v is x, scaled by dt; a skip by head; the gate comes before the norm."""

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.decay = HeadDecay(s)
        self.skip = nn.Parameter(torch.ones(s.dims.num_heads))
        shared = 2 * s.dims.head_k_dim
        self.in_proj = nn.Linear(s.hidden, shared + 2 * s.dims.value_dim, bias=False)
        self.conv = nn.Parameter(torch.zeros(shared + s.dims.value_dim, s.conv_size))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        (H, K, _), D = self.dims, self.dims.value_dim
        qkv, gate = torch.split(self.in_proj(x), [2 * K + D, D], 1)
        q, k, v = torch.split(F.silu(short_conv(qkv, self.conv, batch)), [K, K, D], 1)
        q, k = (part[:, None].expand(-1, H, -1) for part in (q, k))
        o = self.rule(q, k, heads(v, H), x, batch)
        gated = rms(o * F.silu(heads(gate, H).float()), self.sizes.norm_eps) * self.o_norm
        out: Tensor = self.o_proj(gated.flatten(1).to(x.dtype))
        return out

    def rule(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, batch: Batch) -> Tensor:
        g, dt = self.decay(x)
        decay = g[..., None].expand(q.shape)
        o = linear_recurrence(q, k * dt[..., None], v, decay, None, None, batch.cu_seqlens)
        return o + self.skip[:, None] * v


class KDA(LinearBlock):
    """The delta rule with a decay a channel."""

    activation = "sigmoid"

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        H, K, _ = s.dims
        self.b_proj = nn.Linear(s.hidden, H, bias=False)
        self.f_proj = low_rank(s.hidden, RANK, H * K)
        self.A_log = nn.Parameter(torch.zeros(H))
        self.dt_bias = nn.Parameter(torch.zeros(H * K))

    def rule(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, batch: Batch) -> Tensor:
        H, K, _ = self.dims
        dt = F.softplus(self.f_proj(x).float() + self.dt_bias.float())
        g = -self.A_log.float().exp()[:, None] * heads(dt, H)
        kn, beta = unit(k), self.b_proj(x).float().sigmoid()[..., None]
        return linear_recurrence(unit(q) * K**-0.5, beta * kn, v, g, -beta * kn, g.exp() * kn, batch.cu_seqlens)


class RWKV7(Mixer):
    """RWKV-7's time mixing: a token shift for each projection, a decay and a learning rate a channel, a bonus."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        (H, K, V), D = s.dims, s.dims.value_dim
        self.sizes, self.dims = s, s.dims
        self.mix = nn.ParameterList(torch.full((s.hidden,), 0.5) for _ in range(6))  # of r, w, k, v, a, gate
        self.r_proj, self.k_proj = (nn.Linear(s.hidden, H * K, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = nn.Linear(s.hidden, D, bias=False), nn.Linear(D, s.hidden, bias=False)
        self.w_in, self.w_out = nn.Linear(s.hidden, RANK, bias=False), nn.Linear(RANK, H * K, bias=False)
        self.a_proj, self.gate_proj = low_rank(s.hidden, RANK, H * K), low_rank(s.hidden, max(RANK, V), D)
        self.w_bias, self.a_bias = nn.Parameter(torch.zeros(H * K)), nn.Parameter(torch.zeros(H * K))
        self.erase, self.renew = nn.Parameter(torch.ones(H * K)), nn.Parameter(torch.ones(H * K))
        self.bonus = nn.Parameter(torch.zeros(H * K))
        self.o_norm, self.o_bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        H = self.dims.num_heads
        last = F.pad(x[:-1], (0, 0, 1, 0)) * (batch.positions > 0)[:, None]
        xr, xw, xk, xv, xa, xg = (torch.lerp(x, last, m.to(x.dtype).expand_as(x)) for m in self.mix)
        r, k, v = (heads(p(i).float(), H) for p, i in ((self.r_proj, xr), (self.k_proj, xk), (self.v_proj, xv)))
        w = self.w_out(torch.tanh(self.w_in(xw))).float() + self.w_bias
        g = heads(-0.606531 * w.sigmoid(), H)  # exp(-0.5): no channel forgets more than 45 % a token
        a = heads((self.a_proj(xa).float() + self.a_bias).sigmoid(), H)
        kappa = unit(k * self.erase.view(H, -1))
        k = k * (1 + (a - 1) * self.renew.view(H, -1))
        o = linear_recurrence(r, k, v, g, -a * kappa, kappa, batch.cu_seqlens)
        mean = o.mean(-1, keepdim=True)
        o = rms(o - mean, self.sizes.norm_eps).flatten(1) * self.o_norm + self.o_bias
        o = o + ((r * k * self.bonus.view(H, -1)).sum(-1, keepdim=True) * v).flatten(1)
        out: Tensor = self.o_proj((o * self.gate_proj(xg).float().sigmoid()).to(x.dtype))
        return out


MIXERS: dict[str, type[Mixer]] = {
    "gdn": GatedDeltaNet, "deltanet": DeltaNet, "gla": GLA, "retnet": RetNet, "mamba2": Mamba2, "kda": KDA,
    "rwkv7": RWKV7,
}  # fmt: skip
FORMS = {"jet": "jet_block_train", "gdn": "gated_delta_rule_train", "deltanet": "gated_delta_rule_train"}
TORCH = "linear_recurrence, in torch"  # of the others
