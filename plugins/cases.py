"""The plugin nodes of a model as cases - dimensions and dtypes - and the launches that each of them makes.

One set of cubins serves one case: a JetBlock or Gated DeltaNet of given H, K, V, conv_size, dtypes and step buffer; an
attention core of given heads, head_dim, page, window and dtypes. Tokens, sequences, pages and pool rows stay free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from jet_export.kernels import (
    attention,
    attention_decode,
    attention_prefill,
    attention_verify,
    dynamic_conv,
    gated_delta_rule_chunk,
    gated_delta_rule_decode,
    gated_delta_rule_deferred,
    gated_delta_rule_verify,
    gated_rms_norm,
    jet_block,
    rope_append,
    step_buffer,
)
from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import EXTRA, NO_BUFFER, buffer_rows
from jet_export.model.config import JetNemotronConfig
from jet_export.plugins.symbolic import Scalar, Shape, Size, Trace, tracing

T, N = Size("p.T"), Size("p.N")
COLUMNS = Size("p.columns", divisible=True)  # of qkuz
M, P = Size("p.M"), Size("p.P")  # block_table's and cos_sin's
SMS = Size("p.sms")  # multiprocessors of the device
FORMS = (Form.MIXED, Form.DECODE, Form.VERIFY)  # those that a node may ask for, in the order of the table's columns
# Whose launches are traced.
JET_BLOCK_MODULES = [
    dynamic_conv,
    gated_delta_rule_chunk,
    gated_delta_rule_decode,
    gated_delta_rule_deferred,
    gated_delta_rule_verify,
    gated_rms_norm,
    step_buffer,
]
ATTENTION_MODULES = [rope_append, attention_prefill, attention_decode, attention_verify]


@dataclass(frozen=True)
class JetBlockCase:
    num_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_size: int
    dtype: str  # of activations and conv_state: bfloat16, float16, float32
    state_dtype: str  # of recurrent_state: float32, bfloat16
    key_heads: int = 0  # of a Gated DeltaNet: the convolution is static and on q, k and the values; 0: a JetBlock
    interval: int = 1  # the state is written every so many tokens
    rollback: int = 0  # the most tokens of a sequence in the form VERIFY; 0: there is no such form

    @property
    def buffer_rows(self) -> int:
        """Rows of the step buffer; 0: there is none."""
        return buffer_rows(self.interval, self.rollback)

    @property
    def columns(self) -> int:
        """Those of qkuz that are read."""
        keys = (self.key_heads or self.num_heads) * self.head_k_dim
        return 2 * (keys + self.num_heads * self.head_v_dim)

    def shapes(self, T: Any, N: Any, S: Any, columns: Any) -> list[tuple[Any, ...]]:
        """Of the node's inputs; S: the rows of the pools."""
        H, K, V, W = self.num_heads, self.head_k_dim, self.head_v_dim, self.conv_size
        C = H * V + 2 * self.key_heads * K
        shapes = [
            (T, columns), (T, 2 * H), (C * W,) if self.key_heads else (T, C * W), (H,), (H,), (V,),
            (S, W - 1 + self.rollback, C), (S, H, K, V), (N + 1,), (N,), (N,),
        ]  # fmt: skip
        return [*shapes, (S, H, self.buffer_rows, K + V + EXTRA), (S, H)] if self.buffer_rows else shapes

    @property
    def dtypes(self) -> list[str]:
        """Of the node's inputs."""
        x, fp32, i32 = self.dtype, "float32", "int32"
        beside = [fp32, i32] if self.buffer_rows else []
        return [x, x, x, fp32, fp32, x, x, self.state_dtype, i32, i32, i32, *beside]

    @property
    def states(self) -> list[int]:
        """The inputs whose values after the call are the outputs from 1 on."""
        return [6, 7, 11, 12] if self.buffer_rows else [6, 7]

    def trace(self, form: Form) -> Trace:
        """The launches of jet::jet_block."""
        with tracing(JET_BLOCK_MODULES, num_sms=lambda device: SMS) as trace:
            inputs = stand_ins(trace, self.shapes(T, N, Size("p.S"), COLUMNS), self.dtypes, self.states)
            buffer = (*inputs[11:], self.interval) if self.buffer_rows else NO_BUFFER
            sizes = self.num_heads, self.head_k_dim, self.head_v_dim, Scalar("p.eps"), form
            launcher: Any = jet_block.jet_block_triton
            trace.output = launcher(*inputs[:11], *sizes, *buffer).name
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
    rotary_dim: int = 0  # columns of a head that are rotated; 0: all
    rollback: int = 0  # more than 0: there is the form VERIFY

    def shapes(self, T: Any, N: Any, pages: Any, M: Any, P: Any) -> list[tuple[Any, ...]]:
        """Of the node's inputs."""
        Hq, Hkv, Dh = self.num_heads, self.num_kv_heads, self.head_dim
        cache = (pages, 2, Hkv, self.page, Dh)
        return [(T, (Hq + 2 * Hkv) * Dh), (P, self.rotary_dim or Dh), cache, (N, M), (N + 1,), (N,), (N,)]

    @property
    def dtypes(self) -> list[str]:
        """Of the node's inputs."""
        return [self.dtype, self.dtype, self.cache_dtype, *["int32"] * 4]

    @property
    def states(self) -> list[int]:
        """The input whose value after the call is output 1."""
        return [2]

    def trace(self, form: Form) -> Trace:
        """The launches of jet::attention."""
        with tracing(ATTENTION_MODULES, num_sms=lambda device: SMS) as trace:
            inputs = stand_ins(trace, self.shapes(T, N, Size("p.pages"), M, P), self.dtypes, self.states)
            heads = self.num_heads, self.num_kv_heads, self.head_dim, self.window
            launcher: Any = attention.attention_triton
            trace.output = launcher(*inputs, *heads, Scalar("p.k_scale"), Scalar("p.v_scale"), form).name
        return trace


Case = JetBlockCase | AttentionCase


def forms_of(case: Case) -> tuple[Form, ...]:
    """Those of FORMS that the case has."""
    return FORMS if case.rollback else FORMS[:2]


def label(case: Case) -> str:
    """Human-readable: "JetBlock 12 x 96 x 256, convolution 4, bfloat16, state float32"."""
    drafts = f", verifies {case.rollback} tokens" if case.rollback else ""
    if isinstance(case, JetBlockCase):
        name = f"Gated DeltaNet {case.key_heads} / " if case.key_heads else "JetBlock "
        sizes = f"{case.num_heads} x {case.head_k_dim} x {case.head_v_dim}, convolution {case.conv_size}"
        every = f" every {case.interval} tokens" if case.interval > 1 else ""
        return f"{name}{sizes}, {case.dtype}, state {case.state_dtype}{every}{drafts}"
    window = f"window {case.window}" if case.window else "no window"
    rotary = f" ({case.rotary_dim} rotated)" if case.rotary_dim else ""
    heads = f"{case.num_heads} / {case.num_kv_heads} heads of {case.head_dim}{rotary}"
    return f"Attention {heads}, pages of {case.page}, {window}, {case.dtype}, cache {case.cache_dtype}{drafts}"


def stand_ins(trace: Trace, shapes: list[tuple[Any, ...]], dtypes: list[str], states: list[int]) -> list[Any]:
    """The node's inputs without values; states are read and written at the output's address."""
    return [
        Shape(f"p.out({states.index(i) + 1})" if i in states else f"p.in({i})", shape, getattr(torch, dtype), trace)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def model_cases(
    config: JetNemotronConfig,
    *,
    dtype: str = "bfloat16",
    state_dtype: str = "float32",
    cache_dtype: str = "",
    page: int = 128,
    interval: int = 1,
    rollback: int = 0,
) -> list[Case]:
    """The cases of a model, each once. `cache_dtype` defaults to `dtype`; `interval`, `rollback`: as `state_specs`."""
    keys = config.key_heads if config.jet_conv == "static" else 0
    rotary = 0 if config.rope_dim == config.head_dim else config.rope_dim
    cases: list[Case] = []
    sizes = (config.jet_dims(i) if kind == "jet" else None for i, kind in enumerate(config.layer_types))
    for layer, dims in dict.fromkeys(zip(config.layer_types, sizes, strict=True)):
        if dims is not None:
            cases.append(JetBlockCase(*dims, config.conv_size, dtype, state_dtype, keys, interval, rollback))
        else:
            heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
            window = config.window_size if layer == "swa" else 0
            cases.append(AttentionCase(*heads, page, window, dtype, cache_dtype or dtype, rotary, rollback))
    return cases


def case_to_dict(case: Case) -> dict[str, Any]:
    return {"node": "JetBlock" if isinstance(case, JetBlockCase) else "Attention", **asdict(case)}


def case_from_dict(values: dict[str, Any]) -> Case:
    values = dict(values)
    return (JetBlockCase if values.pop("node") == "JetBlock" else AttentionCase)(**values)
