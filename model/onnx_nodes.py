"""JetBlock, Attention and Fp8Linear as nodes of an ONNX graph. Symbolic: traced by torch.onnx, never computed.

    jet::JetBlock     jet_block, states in and states out; attributes as the op's, the form of the call among them; a
                      state with a step buffer has that and its position too
    jet::JetAttention the same for attention (TensorRT takes any node named Attention for ONNX's own)
    Fp8Linear         y = cast(DQ(Q(x))) @ cast(DQ(weight))^T + bias with FP8 weights as initializers; Q and DQ are
                      ONNX's QuantizeLinear and DequantizeLinear, per tensor, in fp32; the casts are to x.dtype

QuantizeLinear divides by the scale, rounds to nearest even and saturates at 448, as fp8.quantize does: the codes are
the model's own. Read literally, a bf16 product's operands are codes times scale rounded to bf16, a rounding that
Fp8Linear does not have. TensorRT for RTX 1.7.1 turns the pattern into one FP8 product of the codes with bf16
results; without the casts the results are fp32, and a kernel after every projection casts them. So a JetBlock node's o
stays in x.dtype: with codes (the op's out_scale) o_proj would have a DQ without its Q, and the plugin an FP8 output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.model.mode import keep_states

DOMAIN, VERSION = "jet", 2  # version 1 had no form


def jet_block_node(
    qkuz: Tensor,
    ba: Tensor,
    kappa: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    w_o: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    num_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    norm_eps: float,
    form: int,
    step_buffer: Tensor | None = None,
    state_position: Tensor | None = None,
    interval: int = 1,
) -> Tensor:
    """[T, D]; arguments as for jet_block. The states after the step become outputs of the graph; with a step buffer the
    node has two inputs, two outputs and an attribute more."""
    inputs = [qkuz, ba, kappa, A_log, dt_bias, w_o, conv_state, recurrent_state, cu_seqlens, slots, context_lens]
    beside = [] if step_buffer is None or state_position is None else [step_buffer, state_position]
    attrs: dict[str, Any] = {
        "num_heads": num_heads,
        "head_k_dim": head_k_dim,
        "head_v_dim": head_v_dim,
        "norm_eps": norm_eps,
        "form": form,
        **({"interval": interval} if beside else {}),
    }
    before = [conv_state, recurrent_state, *beside]
    o, *states = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::JetBlock", [*inputs, *beside], attrs,
        dtypes=[qkuz.dtype, *(s.dtype for s in before)],
        shapes=[(qkuz.shape[0], num_heads * head_v_dim), *(s.shape for s in before)],
        version=VERSION,
    )  # fmt: skip
    keep_states(*states)
    return o


def attention_node(
    qkv: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    k_scale: float,
    v_scale: float,
    form: int,
) -> Tensor:
    """[T, Hq * Dh]; arguments as for attention. The cache after the step becomes an output of the graph."""
    attrs: dict[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "window": window,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "form": form,
    }
    o, cache = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::JetAttention", [qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens], attrs,
        dtypes=[qkv.dtype, kv_cache.dtype],
        shapes=[(qkv.shape[0], num_heads * head_dim), kv_cache.shape],
        version=VERSION,
    )  # fmt: skip
    keep_states(cache)
    return o


def fp8_linear_node(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """[T, N] in x.dtype; arguments as for Fp8Linear. The exporter makes the scales scalars and adds the zero points."""
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear", [x.float(), input_scale], dtype=torch.float8_e4m3fn, shape=x.shape
    )
    return F.linear(_dequantize(codes, input_scale, x.dtype), _dequantize(weight, weight_scale, x.dtype), bias)


def _dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.onnx.ops.symbolic("DequantizeLinear", [codes, scale], dtype=torch.float32, shape=codes.shape)
    return y.to(dtype)
