"""Which rows of which fused parameter each tensor of a published checkpoint fills: read by loading and by saving."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jet_export.model.config import JetNemotronConfig


@dataclass(frozen=True)
class Slice:
    """Rows [start, start + shape[0]) of parameter `param`, seen as rows of shape[1:].

    With `head` the tensor has two parts that alternate every `head` rows, as Qwen3.5's queries and gates do: the first
    fills rows from `start` on, the second from `second` on, shape[0] / 2 each. `offset` is added to what is read."""

    param: str
    start: int
    shape: tuple[int, ...]
    second: int = 0
    head: int = 0
    offset: float = 0.0

    def rows(self, param: Tensor) -> list[Tensor]:
        """Views of the parameter's rows, in the published shape but for their number."""
        count = self.shape[0] // (2 if self.head else 1)
        starts = (self.start, self.second) if self.head else (self.start,)
        whole = param.view(-1, *self.shape[1:])
        return [whole[start : start + count] for start in starts]

    def write(self, param: Tensor, tensor: Tensor) -> list[Tensor]:
        """Fill the parameter's rows from a published tensor. Returns them."""
        rows = self.rows(param)
        parts = [tensor]
        if self.head:
            parts = [part.flatten(0, 1) for part in torch.unflatten(tensor, 0, (-1, 2, self.head)).unbind(1)]
        for row, part in zip(rows, parts, strict=True):
            row.copy_(part)
            if self.offset:
                row.add_(self.offset)
        return rows

    def read(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """The published tensor: a view of the parameter where it can be one. dtype: the model's, for an offset."""
        rows = self.rows(param)
        if self.head:
            rows = [row.view(torch.uint8) if row.dtype.itemsize == 1 else row for row in rows]  # torch stacks no FP8
            heads = [torch.unflatten(row, 0, (-1, self.head)) for row in rows]
            return torch.stack(heads, 1).flatten(0, 2).view(param.dtype)
        return (rows[0] - self.offset).to(dtype) if self.offset else rows[0]


def checkpoint_layout(c: JetNemotronConfig) -> dict[str, Slice]:
    """Published tensor name -> the rows of our parameter that it fills."""
    out: dict[str, Slice] = {}
    d = c.hidden_size
    _fused(out, "embed_tokens.weight", [("model.embed_tokens.weight", c.vocab_size)], d)
    norm_slice(out, c, "norm.weight", "model.norm.weight", d)
    if not c.tie_word_embeddings:
        _fused(out, "lm_head.weight", [("lm_head.weight", c.vocab_size)], d)
    for i, kind in enumerate(c.layer_types):
        ours, pub = f"layers.{i}", f"model.layers.{i}"
        if kind != "jet":
            attention_layer(out, c, ours, pub)
            continue
        _around(out, c, ours, pub)
        mixer = _jet_block if c.jet_conv == "dynamic" else _gated_delta_net
        mixer(out, c, i, f"{ours}.self_attn", pub)
    return out


def attention_layer(out: dict[str, Slice], c: JetNemotronConfig, ours: str, pub: str) -> None:
    """A layer of attention, and what is around it."""
    _around(out, c, ours, pub)
    _attention(out, c, f"{ours}.self_attn", pub)


def _around(out: dict[str, Slice], c: JetNemotronConfig, ours: str, pub: str) -> None:
    """A layer's norms and MLP."""
    d = c.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        norm_slice(out, c, f"{ours}.{norm}.weight", f"{pub}.{norm}.weight", d)
    f, mlp = c.intermediate_size, f"{pub}.mlp"
    gate_up = [(f"{mlp}.gate_proj.weight", f), (f"{mlp}.up_proj.weight", f)]
    _fused(out, f"{ours}.mlp.gate_up_proj.weight", gate_up, d)
    _fused(out, f"{ours}.mlp.down_proj.weight", [(f"{mlp}.down_proj.weight", d)], f)


def _fused(out: dict[str, Slice], param: str, parts: list[tuple[str, int]], *tail: int) -> None:
    """Tensors that fill one parameter, one below the other: their names and rows."""
    start = 0
    for name, rows in parts:
        out[name] = Slice(param, start, (rows, *tail))
        start += rows


def norm_slice(out: dict[str, Slice], c: JetNemotronConfig, param: str, name: str, size: int) -> None:
    out[name] = Slice(param, 0, (size,), offset=1.0 if c.norm_offset else 0.0)


def _jet_block(out: dict[str, Slice], c: JetNemotronConfig, layer: int, ours: str, pub: str) -> None:
    d, dims, theirs = c.hidden_size, c.jet_dims(layer), f"{pub}.self_attn"
    H, HK, D = dims.num_heads, c.key_dim(dims), dims.value_dim
    R = c.generator_dim_of(D)
    gen = f"{theirs}.dynamic_conv1d.kernel_generator"
    names = [f"{theirs}.{p}_proj.weight" for p in "qkvg"] + [f"{gen}.w1.weight"]
    _fused(out, f"{ours}.in_proj.weight", list(zip(names, (HK, HK, D, D, R), strict=True)), d)
    _fused(out, f"{ours}.ba_proj.weight", [(f"{theirs}.b_proj.weight", H), (f"{theirs}.a_proj.weight", H)], d)
    _fused(out, f"{ours}.w2.weight", [(f"{gen}.w2.weight", D * c.conv_size)], R)
    _fused(out, f"{ours}.w2.bias", [(f"{gen}.w2.bias", D * c.conv_size)])
    _fused(out, f"{ours}.A_log", [(f"{theirs}.A_log", H)])
    _fused(out, f"{ours}.dt_bias", [(f"{theirs}.dt_bias", H)])
    _fused(out, f"{ours}.o_norm", [(f"{theirs}.o_norm.weight", dims.head_v_dim)])
    _fused(out, f"{ours}.o_proj.weight", [(f"{theirs}.o_proj.weight", d)], D)


def _gated_delta_net(out: dict[str, Slice], c: JetNemotronConfig, layer: int, ours: str, pub: str) -> None:
    """Qwen3.5's names: `linear_attn`, whose in_proj_qkv is [q | k | v] already."""
    d, dims, theirs = c.hidden_size, c.jet_dims(layer), f"{pub}.linear_attn"
    H, C, D = dims.num_heads, c.conv_dim(dims), dims.value_dim
    parts = [(f"{theirs}.in_proj_qkv.weight", C), (f"{theirs}.in_proj_z.weight", D)]
    _fused(out, f"{ours}.in_proj.weight", parts, d)
    _fused(out, f"{ours}.ba_proj.weight", [(f"{theirs}.in_proj_{p}.weight", H) for p in "ba"], d)
    _fused(out, f"{ours}.conv1d", [(f"{theirs}.conv1d.weight", C)], 1, c.conv_size)
    _fused(out, f"{ours}.A_log", [(f"{theirs}.A_log", H)])
    _fused(out, f"{ours}.dt_bias", [(f"{theirs}.dt_bias", H)])
    _fused(out, f"{ours}.o_norm", [(f"{theirs}.norm.weight", dims.head_v_dim)])
    _fused(out, f"{ours}.o_proj.weight", [(f"{theirs}.out_proj.weight", d)], D)


def _attention(out: dict[str, Slice], c: JetNemotronConfig, ours: str, pub: str) -> None:
    """[q | k | v], and the gates below them where the model has them; there q_proj alternates a head's q and gate."""
    d, theirs = c.hidden_size, f"{pub}.self_attn"
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for what, tail in (("weight", (d,)), ("bias", ()))[: 1 + c.qkv_bias]:
        parts = [(f"{theirs}.{p}_proj.{what}", rows) for p, rows in (("q", q), ("k", kv), ("v", kv))]
        _fused(out, f"{ours}.qkv_proj.{what}", parts, *tail)
        if c.output_gate:
            gated = Slice(f"{ours}.qkv_proj.{what}", 0, (2 * q, *tail), second=q + 2 * kv, head=c.head_dim)
            out[f"{theirs}.q_proj.{what}"] = gated
    _fused(out, f"{ours}.o_proj.weight", [(f"{theirs}.o_proj.weight", d)], q)
    for norm in ("q_norm", "k_norm") if c.qk_norm else ():
        norm_slice(out, c, f"{ours}.{norm}.weight", f"{theirs}.{norm}.weight", c.head_dim)
