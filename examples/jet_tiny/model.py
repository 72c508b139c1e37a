"""Jet-Nemotron in training form: the published parameter names, whole sequences, no caches, plain autograd.

The maths is the published model's (NVlabs/Jet-Nemotron, arXiv 2508.15884), with the two corrections that
jet_export.model makes: a sliding window includes the token itself, and holds `window_size` keys. Weights are
cast to the activations' dtype at each use: fp32 parameters under bf16 activations are master weights.
`state_dict()` is a published checkpoint.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jet_export.model.config import JetDims, JetNemotronConfig
from jet_tiny.delta_rule import delta_rule_chunked


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps) in fp32, then one cast."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (self.weight.float() * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class KernelGenerator(nn.Module):
    """The taps of the dynamic convolution: W2 silu(W1 x) + b2 -> [B, T, 4 D], flat index d*4 + w."""

    def __init__(self, hidden: int, generator_dim: int, taps: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden, generator_dim, bias=False)
        self.w2 = Linear(generator_dim, taps, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)))


class DynamicConv(nn.Module):
    """silu(y), y[t, d] = sum_w kappa[t, d, w] u[t - W + 1 + w, d], zeros before the start."""

    def __init__(self, hidden: int, generator_dim: int, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.kernel_generator = KernelGenerator(hidden, generator_dim, dim * width)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        kappa = self.kernel_generator(x).unflatten(-1, (-1, self.width)).float()  # [B, T, D, W]
        padded = F.pad(u.float(), (0, 0, self.width - 1, 0))
        length = u.shape[1]
        y = sum(kappa[..., w] * padded[:, w : w + length] for w in range(self.width))
        return F.silu(y).to(u.dtype)


class JetBlock(nn.Module):
    def __init__(self, config: JetNemotronConfig, dims: JetDims) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, dims.num_heads
        dim_k, dim_v = heads * dims.head_k_dim, dims.value_dim
        self.heads = heads
        self.q_proj = Linear(hidden, dim_k, bias=False)
        self.k_proj = Linear(hidden, dim_k, bias=False)
        self.v_proj = Linear(hidden, dim_v, bias=False)
        self.b_proj = Linear(hidden, heads, bias=False)
        self.a_proj = Linear(hidden, heads, bias=False)
        self.g_proj = Linear(hidden, dim_v, bias=False)
        self.o_proj = Linear(dim_v, hidden, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.dynamic_conv1d = DynamicConv(hidden, dim_v // config.dconv_generator_reduction, dim_v, config.conv_size)
        self.o_norm = RMSNorm(dims.head_v_dim, config.jet_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (F.silu(proj(x)).unflatten(-1, (self.heads, -1)).float() for proj in (self.q_proj, self.k_proj))
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        v = self.dynamic_conv1d(self.v_proj(x), x).unflatten(-1, (self.heads, -1)).float()
        beta = self.b_proj(x).sigmoid().float()
        g = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        o = delta_rule_chunked(*(s.transpose(1, 2) for s in (q, k, v, beta, g))).transpose(1, 2)  # [B, T, H, V]
        gate = self.g_proj(x).unflatten(-1, (self.heads, -1)).float()
        return self.o_proj((self.o_norm(o) * F.silu(gate)).flatten(2).to(x.dtype))


class Attention(nn.Module):
    """Grouped-query causal attention with rotate-half RoPE; window > 0: key j is visible iff i - window < j <= i."""

    def __init__(self, config: JetNemotronConfig, window: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.window, self.theta = window, config.rope_theta
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, bias=True)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=True)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=True)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        """x [B, T, heads, head_dim]: x cos + rotate_half(x) sin, cos and sin taken in fp32, applied in x's dtype."""
        half = self.head_dim // 2
        frequency = self.theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None] * frequency
        cos, sin = (torch.cat((f, f), -1)[:, None].to(x.dtype) for f in (angle.cos(), angle.sin()))
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (s.repeat_interleave(self.heads // self.kv_heads, 2) for s in (k, v))
        q, k, v = (s.transpose(1, 2) for s in (q, k, v))
        if self.window:
            i = torch.arange(x.shape[1], device=x.device)
            visible = (i[None] <= i[:, None]) & (i[None] > i[:, None] - self.window)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        else:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=False)
        self.up_proj = Linear(hidden, intermediate, bias=False)
        self.down_proj = Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: JetNemotronConfig, layer: int) -> None:
        super().__init__()
        self.dropout = 0.0  # of what each branch adds to the residual stream, in training
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kind = config.layer_types[layer]
        window = config.window_size if kind == "swa" else 0
        self.self_attn = JetBlock(config, config.jet_dims(layer)) if kind == "jet" else Attention(config, window)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, h: Tensor) -> Tensor:
        h = h + F.dropout(self.self_attn(self.input_layernorm(h)), self.dropout, self.training)
        return h + F.dropout(self.mlp(self.post_attention_layernorm(h)), self.dropout, self.training)


class Backbone(nn.Module):
    def __init__(self, config: JetNemotronConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class JetTiny(nn.Module):
    """input_ids [B, T] -> logits [B, T, vocab] in `dtype`, that of the activations. Tied embeddings."""

    def __init__(self, config: JetNemotronConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = Backbone(config)

    def hidden(self, input_ids: Tensor) -> Tensor:
        h = F.embedding(input_ids, self.model.embed_tokens.weight.to(self.dtype))
        for layer in self.model.layers:
            h = layer(h)
        return self.model.norm(h)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.linear(self.hidden(input_ids), self.model.embed_tokens.weight.to(self.dtype))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, 0.02), branch outputs divided by sqrt(2 layers); the published initialisation of A_log and dt_bias."""
        for name, p in self.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(0, 16, generator=generator).log_()
            elif name.endswith("dt_bias"):
                log_dt = torch.rand(p.shape, generator=generator) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)
                dt = log_dt.exp().clamp(min=1e-4)
                p.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif name.endswith(".bias"):
                p.zero_()
            elif p.ndim == 2:
                branch_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = math.sqrt(2 * len(self.model.layers)) if branch_output else 1.0
                p.normal_(0, 0.02 / scale, generator=generator)
        for layer in self.model.layers:
            if isinstance(layer.self_attn, JetBlock):  # the static kernel starts as a plain 4-tap convolution
                layer.self_attn.dynamic_conv1d.kernel_generator.w2.bias.uniform_(-0.5, 0.5, generator=generator)

    def mixers(self) -> list[nn.Module]:
        """Each layer's JetBlock or attention."""
        return [layer.get_submodule("self_attn") for layer in self.model.layers]

    def checkpoint(self) -> dict[str, Tensor]:
        """The published tensors: bf16, with A_log and dt_bias in fp32 (both are used in fp32)."""
        return {
            name: p.detach()
            .to("cpu", torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16)
            .contiguous()
            for name, p in self.state_dict().items()
        }
