"""The layers in trainable form: the inference model's own modules, with a forward over packed rows and no states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from jet_export.kernels.jet_block_train import jet_block_train
from jet_export.model.jet_nemotron import Attention, DecoderLayer, JetBlock
from jet_export.training.data.rows import Batch
from jet_export.training.packed_attention import Attend, rotate


@dataclass(frozen=True)
class Context:
    """What the layers share in a forward pass."""

    batch: Batch
    cos_sin: Tensor  # [T, head_dim], of the tokens' positions in their sequences
    attend: dict[int, Attend]  # by window


class LayerOutput(NamedTuple):
    hidden: Tensor  # [T, hidden], the layer's output
    mixed: Tensor  # [T, hidden], that of its mixer alone


def jet_block(m: JetBlock, x: Tensor, context: Context) -> Tensor:
    """x [T, hidden], normalised -> [T, hidden]."""
    qkuz = m.in_proj(x)
    kappa = m.w2(F.silu(qkuz[:, -m.generator_dim :]))
    sizes = m.num_heads, m.head_k_dim, m.head_v_dim, m.norm_eps
    args = qkuz, m.ba_proj(x), kappa, m.A_log, m.dt_bias, m.o_norm.to(qkuz.dtype), context.batch.cu_seqlens
    with torch.autocast(x.device.type, enabled=False):  # the op chooses its own precision
        o = jet_block_train(*args, *sizes)
    out: Tensor = m.o_proj(o)
    return out


def attention(m: Attention, x: Tensor, context: Context) -> Tensor:
    """x [T, hidden], normalised -> [T, hidden]."""
    rows = context.batch.rows
    qkv = torch.unflatten(m.normed(m.qkv_proj(x)), 1, (-1, m.head_dim))  # [T, Hq + 2 Hkv, Dh]
    q, k, v = torch.split(qkv, [m.num_heads, m.num_kv_heads, m.num_kv_heads], 1)
    q, k = rotate(q, context.cos_sin), rotate(k, context.cos_sin)
    q, k, v = (torch.unflatten(s, 0, (rows, -1)).transpose(1, 2) for s in (q, k, v))  # [R, heads, L, Dh]
    o = context.attend[m.window](q, k, v)
    out: Tensor = m.o_proj(o.transpose(1, 2).flatten(2).flatten(0, 1))
    return out


def mix(mixer: nn.Module, x: Tensor, context: Context) -> Tensor:
    """The mixer of a layer, of either kind."""
    if isinstance(mixer, JetBlock):
        return jet_block(mixer, x, context)
    assert isinstance(mixer, Attention)
    return attention(mixer, x, context)


class TrainingLayer(nn.Module):
    """h += Mix(RMS(h)); h += MLP(RMS(h)), with the modules of a DecoderLayer under their names."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.kind = layer.kind
        self.input_layernorm = layer.input_layernorm
        self.self_attn = layer.self_attn
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp
        self.activation_checkpointing = False

    def forward(self, h: Tensor, context: Context, mixer_only: bool = False) -> LayerOutput:
        """`mixer_only`: no MLP, and `hidden` is h as it came."""
        if self.activation_checkpointing and self.training:
            out: LayerOutput = checkpoint(self._run, h, context, mixer_only, use_reentrant=False)
            return out
        return self._run(h, context, mixer_only)

    def _run(self, h: Tensor, context: Context, mixer_only: bool) -> LayerOutput:
        mixed = mix(self.self_attn, self.input_layernorm(h), context)
        if mixer_only:
            return LayerOutput(h, mixed)
        return LayerOutput(self.mlp(h + mixed, self.post_attention_layernorm), mixed)
