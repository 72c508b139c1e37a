"""Fp8Linear: a linear layer with per-tensor static E4M3 weights and activations.

    q(x) = E4M3(clamp(x / input_scale, -448, 448)),   weight = E4M3(clamp(W / weight_scale, -448, 448))
    y    = (q(x) @ weight^T) * input_scale * weight_scale + bias

Products are summed in fp32, scaled and biased there, and cast once to x.dtype. A scale is amax / 448, 448 being E4M3's
largest number: values beyond the calibrated amax saturate (before torch 2.12, a bare cast makes them NaN). On a GPU
this is one `torch._scaled_mm`; on a CPU the same arithmetic, with the FP8 codes widened to fp32. The device of x at
tracing decides.

Fast accumulation (mode.linears() "fast"): Hopper's tensor cores sum FP8 products with about 14 bits. The library adds
such sums up in fp32 outside of them, and with fast accumulation only at the end: faster and less exact. It has an
effect on Ada and Hopper; on other GPUs, and on a CPU, it changes nothing.

Source: the static per-tensor FP8 scheme of nvidia-modelopt's FP8_DEFAULT_CFG; E4M3: arXiv 2209.05433; fast
accumulation: cuBLAS, CUBLASLT_MATMUL_DESC_FAST_ACCUM; its 14 bits: arXiv 2412.19437, section 3.3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jet_export.model.mode import linears, onnx_mode
from jet_export.model.onnx_nodes import fp8_linear_node

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite float8_e4m3fn
FP8_PROJECTIONS = ("in_proj", "w2", "o_proj", "qkv_proj", "gate_up_proj", "down_proj")  # the large ones, by name
ALIGNMENT = 16  # FP8 tensor cores need K and N to be multiples of this
ROWS = 4096  # rows quantised at a time: bounds the fp32 temporaries of a large matrix


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """q(x), [..., K] float8_e4m3fn. NaN stays NaN; infinities saturate."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def widen(codes: Tensor) -> Tensor:
    """The fp32 values of E4M3 codes, none of them NaN: exact, and ten times as fast as `.float()` on a CPU.

    fp16 has one exponent bit more and 7 fraction bits more: seeee mmm << 7 (sign kept, the new bit cleared) is an
    fp16 number 2^-8 times the code's, subnormals included, since the exponent biases are 15 and 7.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # the sign, extended over the upper byte
    half = (bits << 7) & ~0x4000
    return half.view(torch.float16).float() * 256.0


class Fp8Linear(nn.Module):
    """y = x W^T + bias in FP8. x [T, K] bf16 or fp32 -> y [T, N] of the same dtype. K and N are multiples of 16.

    Or x is q(x) already, from a kernel before; then forward is told y's dtype."""

    weight: Tensor  # [N, K] float8_e4m3fn, row-major
    weight_scale: Tensor  # [1] fp32
    input_scale: Tensor  # [1] fp32
    bias: Tensor | None  # [N], model dtype

    def __init__(self, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> Fp8Linear:
        """Unfilled, for `load_state_dict`. `dtype` is the bias's."""
        return cls(
            torch.empty(out_features, in_features, dtype=FP8, device=device),
            torch.empty(1, dtype=torch.float32, device=device),
            torch.empty(1, dtype=torch.float32, device=device),
            torch.empty(out_features, dtype=dtype, device=device) if bias else None,
        )

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, weight_scale: float, input_scale: float) -> Fp8Linear:
        """Quantise a layer; its bias is shared, its weight is not kept."""
        w = linear.weight.detach()
        has_bias = linear.bias is not None
        out = cls.empty(linear.in_features, linear.out_features, has_bias, w.dtype, w.device)
        out.weight_scale.fill_(weight_scale)
        out.input_scale.fill_(input_scale)
        for start in range(0, linear.out_features, ROWS):
            rows = slice(start, start + ROWS)
            out.weight[rows] = quantize(w[rows], out.weight_scale)
        if has_bias:
            out.bias = linear.bias.detach()
        return out

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # [T, K] -> [T, N]
        if onnx_mode():
            return fp8_linear_node(x, self.weight, self.weight_scale, self.input_scale, self.bias)
        q = x if x.dtype == FP8 else quantize(x, self.input_scale)
        dtype = dtype or x.dtype
        y: Tensor
        if x.device.type == "cpu":
            y = torch.mm(q.float(), widen(self.weight).t()) * (self.input_scale * self.weight_scale)
            return (y if self.bias is None else y + self.bias.float()).to(dtype)
        # The library takes no bias for fp32 outputs.
        fused_bias = None if dtype == torch.float32 else self.bias
        y = torch._scaled_mm(
            q,
            self.weight.t(),
            self.input_scale,
            self.weight_scale,
            bias=fused_bias,
            out_dtype=dtype,
            use_fast_accum=linears() == "fast",
        )
        return y if self.bias is None or fused_bias is not None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
