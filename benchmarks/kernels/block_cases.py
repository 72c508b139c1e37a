"""Inputs of jet_block at published sizes, their errors, and the work that a roofline counts: of JetBlocks and Gated
DeltaNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jet_export.kernels.form import Form
from jet_export.kernels.jet_block import jet_block_ref
from jet_export.kernels.state_layout import NO_BUFFER
from jet_export.model.hub import PRESETS

PREFILL = [(1, 2048), (16, 2048), (1, 16384), (1, 65536)]  # B, T
DECODE = [1, 64, 128, 256, 512]


class Sizes(NamedTuple):
    """Of a layer: H heads of values, HK of q and k; static: the convolution is, over q, k and the values."""

    H: int
    K: int
    V: int
    HK: int
    static: bool

    @classmethod
    def of(cls, preset: str) -> Sizes:
        c = PRESETS[preset]()
        return cls(c.jet_num_heads, c.head_k_dim, c.head_v_dim, c.key_heads, c.jet_conv == "static")


MODELS = {
    "2b": Sizes.of("jet-2b"),
    "4b": Sizes.of("jet-4b"),
    "qwen3.5-2b": Sizes.of("qwen3.5-2b"),
    "qwen3.5-4b": Sizes.of("qwen3.5-4b"),
}


def block_inputs(
    lens: list[int], model: str, state_dtype: torch.dtype = torch.float32, context: int = 0, device: str = "cuda"
) -> tuple:
    """Arguments of jet_block without `form`, bf16; gates by the published initialisation."""
    H, K, V, HK, static = MODELS[model]
    N, T, D = len(lens), sum(lens), H * V
    channels = 2 * HK * K + D if static else D
    beside = 0 if static else D // 8  # columns of the projection that are another kernel's

    def rand(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device=device, dtype=dtype)

    def i32(x):
        return torch.tensor(x, device=device, dtype=torch.int32)

    A_log = torch.empty(H, device=device).uniform_(1, 16).log()
    dt = torch.empty(H, device=device).uniform_(-6.9, -2.3).exp()
    kappa = rand(channels * 4) if static else rand(T, channels * 4)
    return (
        rand(T, 2 * HK * K + 2 * D + beside), rand(T, 2 * H), kappa.mul_(0.5), A_log,
        dt + torch.log(-torch.expm1(-dt)), 1 + 0.1 * rand(V), rand(N, 3, channels), rand(N, H, K, V, dtype=state_dtype),
        i32([0, *lens]).cumsum(0, dtype=torch.int32), torch.arange(N, device=device, dtype=torch.int32),
        i32([context] * N), H, K, V, 1e-5,
    )  # fmt: skip


def rel(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def correctness(model: str) -> dict[str, float]:
    """Relative errors against fp64 of a small prefill and a decode step."""
    errors = {}
    reference: Callable[..., Tensor] = jet_block_ref
    for name, lens, form in (("prefill", [1, 65, 300], Form.PREFILL), ("decode", [1] * 8, Form.DECODE)):
        args = block_inputs(lens, model, context=4)
        exact: list[Any] = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        want = reference(*exact, form)
        errors[name] = rel(torch.ops.jet.jet_block(*args, form, *NO_BUFFER, None), want)
        errors[f"{name} state"] = rel(args[7], exact[7])
    return errors


def rule_work(n: int, model: str) -> tuple[int, int]:
    """Bytes that the delta rule alone must move for n tokens of prompts (q, k, v, the result), and its FLOPs."""
    H, K, V, HK, _ = MODELS[model]
    return n * 2 * (2 * HK * K + 2 * H * V), n * H * (2 * 64 * (3 * K + V) + 2 * (64 * V + 3 * K * V))


def prefill_work(n: int, model: str) -> tuple[int, int]:
    """The same of jet_block: q, k, u, gate, the result, and kappa where each token has its own."""
    H, K, V, HK, static = MODELS[model]
    return n * 2 * (2 * HK * K + (3 if static else 7) * H * V), rule_work(n, model)[1]


def decode_work(B: int, model: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of B sequences' states, read and written, and the layers that a graph has: one of few launches would show
    its own start."""
    H, K, V, *_ = MODELS[model]
    moved = 2 * B * H * K * V * dtype.itemsize
    return moved, max(8, min(24, int(2e10 / moved)))
