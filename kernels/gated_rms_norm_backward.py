"""Gradients of the gated RMS norm (forward: gated_rms_norm.py). Per head, with r = rsqrt(mean_V(o^2) + eps):

n = o r w_o;   out = n silu(gate);   dgate = dout n silu'(gate);   dn = dout silu(gate)
dw_o = sum over tokens and heads of dn o r;   do = r (dn w_o - o r mean_V(dn w_o o r))
"""

from torch import Tensor
from torch.nn.functional import silu

from jet_export.kernels.common import acc_dtype
from jet_export.kernels.gated_delta_rule_torch import silu_gradient


def gated_rms_norm_forward_torch(o: Tensor, w_o: Tensor, gate: Tensor, eps: float) -> Tensor:
    """[T, H, V] in fp32 (fp64 for fp64 inputs)."""
    acc = acc_dtype(gate.dtype)
    o = o.to(acc)
    return o * (o.square().mean(-1, keepdim=True) + eps).rsqrt() * w_o.to(acc) * silu(gate.to(acc))


def gated_rms_norm_backward_torch(
    o: Tensor,  # [T, H, V]
    w_o: Tensor,  # [V]
    gate: Tensor,  # [T, H, V]
    eps: float,
    dout: Tensor,  # [T, H, V]
) -> tuple[Tensor, Tensor, Tensor]:  # do [T, H, V], dw_o [V], dgate [T, H, V]
    """In fp32 (fp64 for fp64 inputs)."""
    acc = acc_dtype(gate.dtype)
    o, w_o, gate, dout = (x.to(acc) for x in (o, w_o, gate, dout))
    r = (o.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, dn = o * r, dout * silu(gate)
    dnw = dn * w_o
    do = r * (dnw - normed * (dnw * normed).mean(-1, keepdim=True))
    return do, (dn * normed).sum((0, 1)), silu_gradient(gate, dout * normed * w_o)
