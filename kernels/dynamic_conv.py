"""Dynamic convolution: a causal depthwise convolution whose taps are computed for every token and channel.

    y[t, d] = sum_w kappa[t, d, w] * u[t - (W-1) + w, d]        w = W-1 is the current token
    v = silu(y)

u [T, D] packed tokens, kappa [T, D*W] read as [T, D, W]. Tokens before the call come from `conv_state` [S, W-1, D],
the last W-1 raw u of each sequence (oldest first), which is updated in place. Accumulation in fp32, one rounding.
Source: Jet-Nemotron, arXiv 2508.15884, section 3.3 (JetBlock).
"""

import torch
from torch import Tensor

from jet_export.kernels.common import acc_dtype, gather_state, scatter_state, sequence_of_token, zero_padding


def dynamic_conv_ref(
    u: Tensor,  # [T, D]
    kappa: Tensor,  # [T, D*W]
    conv_state: Tensor,  # [S, W-1, D], updated in place
    cu_seqlens: Tensor,  # [N+1]
    slots: Tensor,  # [N]
    context_lens: Tensor,  # [N]
) -> Tensor:  # [T, D], not yet rounded: fp32 (fp64 for fp64 inputs)
    """The specification, in plain torch."""
    T, D = u.shape
    W = conv_state.shape[1] + 1
    acc = acc_dtype(u.dtype)
    u_acc, taps = u.to(acc), kappa.to(acc).view(T, D, W)
    history = gather_state(conv_state, slots, context_lens, acc)  # [N, W-1, D]
    i_n = sequence_of_token(cu_seqlens, T)
    t = torch.arange(T, device=u.device)
    position = t - cu_seqlens.long()[i_n]

    def at(i_n: Tensor, t: Tensor, position: Tensor) -> Tensor:
        """Raw u at a position of a sequence; negative positions are the history."""
        past = history[i_n, (W - 1 + position).clamp(0, W - 2)]
        return torch.where((position >= 0)[:, None], u_acc[t.clamp(min=0)], past)

    y = torch.zeros_like(u_acc)
    for w in range(W):
        back = W - 1 - w
        y = y + taps[:, :, w] * at(i_n, t - back, position - back)
    v = zero_padding(torch.nn.functional.silu(y), cu_seqlens, slots)

    rows = torch.arange(slots.shape[0], device=u.device)
    ends, lens = cu_seqlens[1:].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    last = [at(rows, ends - back, lens - back) for back in range(W - 1, 0, -1)]
    scatter_state(conv_state, slots, torch.stack(last, 1))
    return v


@torch.library.custom_op("jet::dynamic_conv_cpu", mutates_args={"conv_state"})
def dynamic_conv_cpu(
    u: Tensor, kappa: Tensor, conv_state: Tensor, cu_seqlens: Tensor, slots: Tensor, context_lens: Tensor
) -> Tensor:
    return dynamic_conv_ref(u, kappa, conv_state, cu_seqlens, slots, context_lens).to(u.dtype)


@dynamic_conv_cpu.register_fake
def _(u, kappa, conv_state, cu_seqlens, slots, context_lens):
    return u.new_empty(u.shape)


@torch.library.triton_op("jet::dynamic_conv", mutates_args={"conv_state"})
def dynamic_conv(
    u: Tensor, kappa: Tensor, conv_state: Tensor, cu_seqlens: Tensor, slots: Tensor, context_lens: Tensor
) -> Tensor:
    """v [T, D] = silu(dynamic convolution of u); conv_state is updated in place. See the module's equations."""
    return torch.ops.jet.dynamic_conv_cpu(u, kappa, conv_state, cu_seqlens, slots, context_lens)
