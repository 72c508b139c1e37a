"""The mixers of a layer: JetBlock or Gated DeltaNet, and attention. Between its projections each is one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jet_export.kernels import attention as _attention  # noqa: F401  registers jet::attention
from jet_export.kernels import jet_block as _jet_block  # noqa: F401  registers jet::jet_block
from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch
from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.model.linear import Hidden, Layers, norm_later, project, scales
from jet_export.model.mode import inductor_mode, onnx_mode
from jet_export.model.onnx_nodes import attention_node, jet_block_node
from jet_export.model.rms_norm import RMSNorm


class JetBlock(nn.Module):
    """Gated delta rule; the core is `jet::jet_block`. Its convolution is dynamic and on the values, as in Jet-Nemotron,
    or static and on q, k and the values, as in Gated DeltaNet (Qwen3.5): then no layer generates its kernel."""

    def __init__(self, c: JetNemotronConfig, dims: JetDims) -> None:
        super().__init__()
        (H, K, V), D = dims, dims.value_dim
        R = c.generator_dim_of(D)
        self.num_heads, self.head_k_dim, self.head_v_dim, self.generator_dim = H, K, V, R
        self.norm_eps = c.jet_norm_eps
        width = 2 * c.key_dim(dims) + 2 * D + R
        self.in_proj = nn.Linear(c.hidden_size, width, bias=False)  # [q | k | v | gate | w1]
        self.ba_proj = nn.Linear(c.hidden_size, 2 * H, bias=False)  # [b | a]
        if c.jet_conv == "dynamic":
            self.w2 = nn.Linear(R, D * c.conv_size, bias=True)
        else:
            self.conv1d = nn.Parameter(torch.zeros(c.conv_dim(dims) * c.conv_size))  # of [q | k | v]: [C * W]
        self.A_log = nn.Parameter(torch.zeros(H))  # fp32 in every model dtype, as dt_bias
        self.dt_bias = nn.Parameter(torch.zeros(H))
        self.o_norm = nn.Parameter(torch.ones(V))
        self.o_proj = nn.Linear(D, c.hidden_size, bias=False)

    def forward(
        self,
        h: Hidden,
        norm: RMSNorm,
        batch: PackedBatch,
        state: tuple[Tensor, ...],
        form: Form,
        ahead: Layers = (),
        interval: int = 1,
    ) -> Hidden:
        """h + JetBlock(norm(h)). ahead: the linear layer that follows the block."""
        x, later = norm_later(h, norm, self.in_proj, self.ba_proj)
        if self.generator_dim:
            qkuz = project(self.in_proj, x, later, ahead=(self.w2, self.o_proj))  # [T, 2 HK K + 2D + R]
            kappa = project(self.w2, qkuz[:, -self.generator_dim :], silu=True, ahead=ahead)  # [T, D * W]
        else:
            qkuz = project(self.in_proj, x, later, ahead=(self.o_proj, *ahead))
            kappa = self.conv1d
        conv_state, recurrent_state, *buffer = state
        step_buffer, state_position = buffer or (None, None)
        args = (
            qkuz, project(self.ba_proj, x, later), kappa,
            self.A_log, self.dt_bias, self.o_norm, conv_state, recurrent_state,
            batch.cu_seqlens, batch.slots, batch.context_lens,
            self.num_heads, self.head_k_dim, self.head_v_dim, self.norm_eps, int(form),
        )  # fmt: skip
        if onnx_mode():
            o = jet_block_node(*args, step_buffer, state_position, interval)
        else:
            out_scale = scales(self.o_proj)[0] if inductor_mode() else None
            o = torch.ops.jet.jet_block(*args, step_buffer, state_position, interval, out_scale)
        return project(self.o_proj, o, residual=h)


class Attention(nn.Module):
    """Grouped-query attention, causal (window 0) or sliding-window; the core is `jet::attention`.

    With an output gate (Qwen3.5) the core's output is multiplied by sigmoid(gate), both in the model dtype."""

    def __init__(self, c: JetNemotronConfig, window: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.window = window
        self.k_scale = self.v_scale = 1.0  # of an FP8 KV cache
        self.gate_dim = c.num_attention_heads * c.head_dim if c.output_gate else 0
        heads = c.num_attention_heads * (2 if c.output_gate else 1) + 2 * c.num_key_value_heads
        self.qkv_proj = nn.Linear(c.hidden_size, heads * c.head_dim, bias=c.qkv_bias)  # [q | k | v | gate]
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(
        self,
        h: Hidden,
        norm: RMSNorm,
        cos_sin: Tensor,
        batch: PackedBatch,
        state: tuple[Tensor, ...],
        form: Form,
        ahead: Layers = (),
    ) -> Hidden:
        """h + Attention(norm(h)). ahead: the linear layer that follows the block."""
        (kv_cache,) = state
        ahead = (self.o_proj, *ahead)
        qkv, gate = self.split_gate(project(self.qkv_proj, *norm_later(h, norm, self.qkv_proj), ahead=ahead))
        args = (
            self.normed(qkv), cos_sin, kv_cache, batch.window_block_table if self.window else batch.block_table,
            batch.cu_seqlens, batch.slots, batch.context_lens,
            self.num_heads, self.num_kv_heads, self.head_dim, self.window, self.k_scale, self.v_scale, int(form),
        )  # fmt: skip
        o = attention_node(*args) if onnx_mode() else torch.ops.jet.attention(*args)
        if gate is not None:
            o = o * torch.sigmoid(gate)
        return project(self.o_proj, o, residual=h)

    def split_gate(self, qkvg: Tensor) -> tuple[Tensor, Tensor | None]:
        """qkv [T, (Hq + 2 Hkv) * Dh], and the gate [T, Hq * Dh] in a model that has one."""
        if not self.gate_dim:
            return qkvg, None
        qkv, gate = torch.split(qkvg, [qkvg.shape[1] - self.gate_dim, self.gate_dim], 1)
        return qkv, gate

    def normed(self, qkv: Tensor) -> Tensor:  # [T, (Hq + 2 Hkv) * Dh]
        """qkv with every head of q and k normalised over head_dim, in a model with qk-norm (Qwen3); else qkv itself."""
        if self.q_norm is None or self.k_norm is None:
            return qkv
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = torch.split(torch.unflatten(qkv, 1, (-1, self.head_dim)), heads, 1)  # [T, heads, Dh]
        return torch.cat([self.q_norm(q), self.k_norm(k), v], 1).flatten(1)
