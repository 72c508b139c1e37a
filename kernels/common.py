"""What the kernels share: the packed-token contract on the host, and small jit functions for the device.

Packed tokens: x is [T, ...] for N sequences, `cu_seqlens` [N+1] int32 their bounds, `slots` [N] int32 their rows in
the state pools (< 0: a padding row - nothing read, nothing written, output zero), `context_lens` [N] int32 the tokens
already held (0: start from zero state, whatever the pool holds). Every sequence has at least one token, so T == N
means decode.
"""

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype references compute in: fp64 for fp64 inputs, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64: the sequence each packed token belongs to."""
    t = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(t, cu_seqlens[1:].contiguous(), right=True)


def gather_state(pool: Tensor, slots: Tensor, context_lens: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, ...] initial states: rows `slots` of `pool`, zero where nothing is held or the row is padding."""
    held = (slots >= 0) & (context_lens > 0)
    rows = pool[slots.clamp(min=0).long()].to(dtype)
    return torch.where(held.view(-1, *[1] * (pool.dim() - 1)), rows, torch.zeros_like(rows))


def scatter_state(pool: Tensor, slots: Tensor, state: Tensor) -> None:
    """Writes `state` [N, ...] into rows `slots` of `pool`, padding rows excepted."""
    valid = slots >= 0
    pool[slots[valid].long()] = state[valid].to(pool.dtype)


def zero_padding(x: Tensor, cu_seqlens: Tensor, slots: Tensor) -> Tensor:
    """x [T, ...] with the tokens of padding rows set to zero."""
    live = (slots >= 0)[sequence_of_token(cu_seqlens, x.shape[0])]
    return torch.where(live.view(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))
