"""The plugin nodes of a model as cases - dimensions and dtypes - and the launches that each of them makes.

One set of cubins serves one case: a JetBlock of given H, K, V, conv_size, dtype and state dtype; an attention core of
given heads, head_dim, page, window, dtype and cache dtype. Tokens, sequences, pages and pool rows stay free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from jet_export.kernels import (
    attention,
    attention_decode,
    attention_prefill,
    dynamic_conv,
    gated_delta_rule_chunk,
    gated_delta_rule_decode,
    gated_rms_norm,
    jet_block,
    rope_append,
)
from jet_export.kernels.form import Form
from jet_export.model.config import JetNemotronConfig
from jet_export.plugins.symbolic import Scalar, Shape, Size, Trace, tracing

T, N = Size("p.T"), Size("p.N")
COLUMNS = Size("p.columns", divisible=True)  # of qkuz
M, P = Size("p.M"), Size("p.P")  # block_table's and cos_sin's
SMS = Size("p.sms")  # multiprocessors of the device
INT = torch.int32
FORMS = (Form.MIXED, Form.DECODE)  # those that a node may ask for, in the order of the table's columns


@dataclass(frozen=True)
class JetBlockCase:
    num_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_size: int
    dtype: str  # of activations and conv_state: bfloat16, float16, float32
    state_dtype: str  # of recurrent_state: float32, bfloat16

    def trace(self, form: Form) -> Trace:
        """The launches of jet::jet_block."""
        H, K, V, W = self.num_heads, self.head_k_dim, self.head_v_dim, self.conv_size
        dtype, state, fp32 = getattr(torch, self.dtype), getattr(torch, self.state_dtype), torch.float32
        modules = [dynamic_conv, gated_delta_rule_chunk, gated_delta_rule_decode, gated_rms_norm]
        S = Size("p.S")
        with tracing(modules) as trace:
            inputs = inputs_of(
                trace,
                ((T, COLUMNS), dtype),
                ((T, 2 * H), dtype),
                ((T, H * V * W), dtype),
                ((H,), fp32),
                ((H,), fp32),
                ((V,), dtype),
                ((S, W - 1, H * V), dtype),
                ((S, H, K, V), state),
                ((N + 1,), INT),
                ((N,), INT),
                ((N,), INT),
                states={6: 1, 7: 2},
            )
            launcher: Any = jet_block.jet_block_triton
            trace.output = launcher(*inputs, H, K, V, Scalar("p.eps"), form).name
        return trace


@dataclass(frozen=True)
class AttentionCase:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page: int
    window: int
    dtype: str
    cache_dtype: str  # dtype, or float8_e4m3fn

    def trace(self, form: Form) -> Trace:
        """The launches of jet::attention."""
        Hq, Hkv, Dh = self.num_heads, self.num_kv_heads, self.head_dim
        dtype, cache = getattr(torch, self.dtype), getattr(torch, self.cache_dtype)
        modules = [rope_append, attention_prefill, attention_decode]
        with tracing(modules, num_sms=lambda device: SMS) as trace:
            tensors = inputs_of(
                trace,
                ((T, (Hq + 2 * Hkv) * Dh), dtype),
                ((P, Dh), dtype),
                ((Size("p.pages"), 2, Hkv, self.page, Dh), cache),
                ((N, M), INT),
                ((N + 1,), INT),
                ((N,), INT),
                ((N,), INT),
                states={2: 1},
            )
            sizes = Hq, Hkv, Dh, self.window, Scalar("p.k_scale"), Scalar("p.v_scale")
            launcher: Any = attention.attention_triton
            trace.output = launcher(*tensors, *sizes, form).name
        return trace


Case = JetBlockCase | AttentionCase


def label(case: Case) -> str:
    """Human-readable: "JetBlock 12 x 96 x 256, bfloat16, state float32"."""
    if isinstance(case, JetBlockCase):
        sizes = f"{case.num_heads} x {case.head_k_dim} x {case.head_v_dim}, convolution {case.conv_size}"
        return f"JetBlock {sizes}, {case.dtype}, state {case.state_dtype}"
    window = f"window {case.window}" if case.window else "no window"
    heads = f"{case.num_heads} / {case.num_kv_heads} heads of {case.head_dim}"
    return f"Attention {heads}, pages of {case.page}, {window}, {case.dtype}, cache {case.cache_dtype}"


def inputs_of(trace: Trace, *inputs: tuple[tuple[Any, ...], torch.dtype], states: dict[int, int]) -> list[Any]:
    """Stand-ins for the node's inputs; states are read and written at the output's address."""
    return [
        Shape(f"p.out({states[i]})" if i in states else f"p.in({i})", shape, dtype, trace)
        for i, (shape, dtype) in enumerate(inputs)
    ]


def model_cases(
    config: JetNemotronConfig,
    *,
    dtype: str = "bfloat16",
    state_dtype: str = "float32",
    cache_dtype: str = "",
    page: int = 128,
) -> list[Case]:
    """The cases of a model, each once. `cache_dtype` defaults to `dtype`."""
    cases: list[Case] = []
    sizes = (config.jet_dims(i) if kind == "jet" else None for i, kind in enumerate(config.layer_types))
    for layer, dims in dict.fromkeys(zip(config.layer_types, sizes, strict=True)):
        if dims is not None:
            cases.append(JetBlockCase(*dims, config.conv_size, dtype, state_dtype))
        else:
            heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
            window = config.window_size if layer == "swa" else 0
            cases.append(AttentionCase(*heads, page, window, dtype, cache_dtype or dtype))
    return cases


def case_to_dict(case: Case) -> dict[str, Any]:
    return {"node": "JetBlock" if isinstance(case, JetBlockCase) else "Attention", **asdict(case)}


def case_from_dict(values: dict[str, Any]) -> Case:
    values = dict(values)
    return (JetBlockCase if values.pop("node") == "JetBlock" else AttentionCase)(**values)
