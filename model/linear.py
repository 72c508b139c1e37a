"""The linear layers of a model with what stands around them: kernels that take it in where the graph is one of few
tokens (mode.linears), elsewhere plain PyTorch, which compilers fuse as they like."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jet_export.kernels import add_norm as _add_norm  # noqa: F401  registers jet::add_norm
from jet_export.kernels.skinny_gemm import splits_of
from jet_export.model.fp8 import FP8, Fp8Linear, quantize
from jet_export.model.mode import linears, onnx_mode
from jet_export.model.rms_norm import RMSNorm

SKINNY_OUTPUTS = 128, 65536


def add(h: Tensor, y: Tensor) -> Tensor:
    """h + y. The sum of two 16-bit numbers is the same by way of fp32, and Inductor then adds in the kernel that reads
    the sum next; it would give `h + x @ W` to cuBLAS, which first copies h."""
    if h.dtype not in (torch.bfloat16, torch.float16) or onnx_mode():
        return h + y
    return (h.float() + y.float()).to(h.dtype)


class Unsummed:
    """residual + layer(x) whose sums over x are still in parts: the next norm adds them up and sets `total`."""

    def __init__(self, residual: Tensor, layer: nn.Module, partials: Tensor) -> None:
        self.residual, self.layer, self.partials = residual, layer, partials
        self.total: Tensor | None = None

    def normed(self, norm: RMSNorm, layers: tuple[nn.Module, ...]) -> Normed:
        """For layers that follow the norm. Sets `total`."""
        small = next((m for m in layers if isinstance(m, nn.Linear) and m.bias is None and not skinny(m)), None)
        others = [layer for layer in layers if layer is not small]
        fp8 = [layer for layer in others if isinstance(layer, Fp8Linear)]
        y_scale, z_weight = fp8[0].input_scale if fp8 else None, small.weight if small else None
        self.total, a, codes, z = torch.ops.jet.add_norm(
            self.partials, *scales(self.layer), self.layer.bias, self.residual, norm.weight, y_scale, z_weight,
            norm.eps, not layers or len(fp8) < len(others),
        )  # fmt: skip
        return Normed(a, codes, small, z)


class Normed(NamedTuple):
    """What layers multiply: in the model dtype, and in the codes of those in FP8. Empty where none asks for it."""

    values: Tensor  # [T, K]
    codes: Tensor  # [T, K] float8_e4m3fn
    small: nn.Module | None  # a layer of few outputs, whose product came with the norm
    product: Tensor  # [T, N], its output


Hidden: TypeAlias = Tensor | Unsummed  # between the layers, [T, hidden]
Input: TypeAlias = Tensor | Normed  # of linear layers
Layers: TypeAlias = tuple[nn.Module, ...]


def scales(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return (layer.input_scale, layer.weight_scale) if isinstance(layer, Fp8Linear) else (None, None)


def fused(layer: nn.Module) -> bool:
    """Whether the layer is a jet::gemv here that takes in what stands around it."""
    return linears() == "fused" and isinstance(layer, (nn.Linear, Fp8Linear))


def skinny(layer: nn.Module) -> bool:
    """Whether the layer is one of skinny_gemm.py's here. Of few outputs there are too few programs; the library
    multiplies by a vocabulary as fast as it can be read."""
    if linears() != "skinny" or not isinstance(layer, (nn.Linear, Fp8Linear)):
        return False
    return SKINNY_OUTPUTS[0] <= layer.out_features <= SKINNY_OUTPUTS[1]


def norm_later(h: Hidden, norm: RMSNorm, *layers: nn.Module) -> tuple[Input, RMSNorm | None]:
    """What `project` takes to normalise h for all these layers: h and the norm, or norm(h) computed once."""
    if isinstance(h, Unsummed):
        return h.normed(norm, layers), None
    return (h, norm) if all(map(fused, layers)) else (norm(h), None)


def normed(h: Hidden, norm: RMSNorm) -> Tensor:
    """norm(h), for what is no linear layer of the block."""
    return h.normed(norm, ()).values if isinstance(h, Unsummed) else norm(h)


@overload
def project(
    layer: nn.Module, x: Input, norm: RMSNorm | None = None, *, silu: bool = False, ahead: Layers = ()
) -> Tensor: ...


@overload
def project(
    layer: nn.Module,
    x: Input,
    norm: RMSNorm | None = None,
    *,
    silu: bool = False,
    residual: Hidden,
    ahead: Layers = (),
) -> Hidden: ...


def project(
    layer: nn.Module,
    x: Input,  # [T, K]
    norm: RMSNorm | None = None,
    *,
    silu: bool = False,
    residual: Hidden | None = None,  # [T, N]
    ahead: Layers = (),
) -> Hidden:  # [T, N]
    """residual + layer(silu(norm(x))), each of the three if asked for. x may be an FP8 layer's codes if there is a
    residual. ahead: up to two layers that come next, whose weights kernels ask for while they wait."""
    if isinstance(residual, Unsummed):
        assert residual.total is not None
        residual = residual.total
    if fused(layer):
        assert isinstance(x, Tensor)
        dtype = x.dtype if residual is None else residual.dtype
        return gemv(layer, x, norm, silu=silu, residual=residual, dtype=dtype, ahead=ahead)
    x = x if norm is None or isinstance(x, Normed) else norm(x)
    if silu:
        assert isinstance(x, Tensor)
        x = F.silu(x)
    if isinstance(x, Normed) and layer is x.small:
        return x.product
    if skinny(layer):
        if residual is None:
            return skinny_linear(layer, x, ahead=ahead)
        return Unsummed(residual, layer, skinny_partials(layer, x, ahead))
    x = x.values if isinstance(x, Normed) else x
    dtype = x.dtype if residual is None else residual.dtype
    if linears() == "gemv" and isinstance(layer, (nn.Linear, Fp8Linear)):
        y = gemv(layer, multiplied(layer, x), None, dtype=dtype)
    else:
        y = layer(x, dtype) if x.dtype == FP8 else layer(x)
    return y if residual is None else add(residual, y)


def project_gated(gate_up: nn.Module, x: Input, norm: RMSNorm | None, down: nn.Module) -> Tensor:
    """silu(gate) * up of [gate | up] = gate_up(norm(x)) [T, 2 I] -> [T, I]; where both layers are kernels and `down` is
    an FP8 layer, in the codes that `down` multiplies."""
    if fused(gate_up):
        assert isinstance(x, Tensor)
        y_scale = down.input_scale if isinstance(down, Fp8Linear) and fused(down) else None
        return gemv(gate_up, x, norm, gated=True, y_scale=y_scale, dtype=x.dtype, ahead=(down,))
    if skinny(gate_up) and norm is None:
        y_scale = down.input_scale if isinstance(down, Fp8Linear) and skinny(down) else None
        return skinny_linear(gate_up, x, gated=True, y_scale=y_scale, ahead=(down,))
    gate, up = project(gate_up, x, norm).chunk(2, dim=-1)
    return F.silu(gate) * up


def multiplied(layer: nn.Module, x: Input) -> Tensor:
    """What the layer's weights are multiplied with: codes, for one in FP8."""
    if not isinstance(layer, Fp8Linear):
        return x.values if isinstance(x, Normed) else x
    if isinstance(x, Normed):
        return x.codes
    return x if x.dtype == FP8 else quantize(x, layer.input_scale)


def weights(layers: Layers) -> list[Tensor]:
    return [layer.weight for layer in layers if isinstance(layer, (nn.Linear, Fp8Linear))]


def skinny_linear(
    layer: Any, x: Input, *, gated: bool = False, y_scale: Tensor | None = None, ahead: Layers = ()
) -> Tensor:
    dtype = x.values.dtype if isinstance(x, Normed) else x.dtype
    y: Tensor = torch.ops.jet.skinny_linear(
        multiplied(layer, x), layer.weight, *scales(layer), layer.bias, y_scale, gated, dtype, weights(ahead)
    )
    return y


def skinny_partials(layer: Any, x: Input, ahead: Layers) -> Tensor:
    splits = splits_of(layer.weight)
    y: Tensor = torch.ops.jet.skinny_partials(multiplied(layer, x), layer.weight, splits, weights(ahead))
    return y


def gemv(
    layer: Any,
    x: Tensor,
    norm: RMSNorm | None,
    *,
    dtype: torch.dtype,
    silu: bool = False,
    gated: bool = False,
    residual: Tensor | None = None,
    y_scale: Tensor | None = None,
    ahead: Layers = (),
) -> Tensor:
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    y: Tensor = torch.ops.jet.gemv(
        x, layer.weight, *scales(layer), layer.bias, weight, residual, y_scale, eps, silu, gated, dtype,
        weights(ahead),
    )  # fmt: skip
    return y
