"""Gated RMS norm over a head: out = o * rsqrt(mean_V(o^2) + eps) * w_o * silu(gate), fp32 inside, one rounding.

o, gate [T, H, V]; w_o [V] is shared by the heads. The norm comes before the gate.
Source: Gated DeltaNet, arXiv 2412.06464, figure 1; used unchanged by Jet-Nemotron's JetBlock.
"""

import torch
from torch import Tensor

from jet_export.kernels.common import acc_dtype


def gated_rms_norm_ref(
    o: Tensor,  # [T, H, V]
    w_o: Tensor,  # [V]
    gate: Tensor,  # [T, H, V]
    eps: float,
) -> Tensor:  # [T, H, V]
    """The specification, in plain torch; the result has gate's dtype."""
    acc = acc_dtype(gate.dtype)
    o_acc = o.to(acc)
    normed = o_acc * torch.rsqrt(o_acc.square().mean(-1, keepdim=True) + eps) * w_o.to(acc)
    return (normed * torch.nn.functional.silu(gate.to(acc))).to(gate.dtype)


@torch.library.custom_op("jet::gated_rms_norm_cpu", mutates_args=())
def gated_rms_norm_cpu(o: Tensor, w_o: Tensor, gate: Tensor, eps: float) -> Tensor:
    return gated_rms_norm_ref(o, w_o, gate, eps).contiguous()


@gated_rms_norm_cpu.register_fake
def _(o, w_o, gate, eps):
    return gate.new_empty(gate.shape)


@torch.library.triton_op("jet::gated_rms_norm", mutates_args=())
def gated_rms_norm(o: Tensor, w_o: Tensor, gate: Tensor, eps: float) -> Tensor:
    """[T, H, V] in gate's dtype. See the module's equation."""
    return torch.ops.jet.gated_rms_norm_cpu(o, w_o, gate, eps)
