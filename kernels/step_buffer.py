"""A recurrent state that is written every few tokens: the tokens since then are kept beside it.

A state [K, V] of the gated delta rule after tokens 1 .. c, in terms of the state before them:

    state = exp(G) state0 + sum_j exp(G - G_j) kn_j delta_j^T        G_j = g_1 + ... + g_j,  G = G_c

so (kn, delta, g) of the last tokens stand for a state that has not been written. Two pools beside recurrent_state:

    step_buffer     [S, H, rows, K + V + 4] fp32: kn | delta | g | unused (rows start at multiples of 16 bytes)
    state_position  [S, H] int32: the tokens that recurrent_state holds

The token at position p lies in row p - state_position, and c = context_lens - state_position tokens are held. Taking
tokens back is a smaller context_lens in the next call; the pools need nothing. With `interval` L and at most R tokens
in a call of the form VERIFY there are L - 1 + R rows:

    DECODE         c + 1 < L: the token is appended; otherwise the state is written with it
    VERIFY         c >= L: first the state is written, with the held tokens and none of this call's, which may be taken
                   back; then all tokens of the call are appended
    PREFILL, MIXED sequences of more than one token: their held tokens are applied first, and the call leaves the
                   state written; in MIXED the others are as in DECODE

A sequence with context_lens == 0 holds nothing, whatever the pools say, and a state at position 0 is zero, whatever
its pool holds. Source: ReplaySSM (vllm#47572).
"""

import torch
from torch import Tensor

from jet_export.kernels.common import acc_dtype, by_rows, gather_state


def held_tokens(step_buffer: Tensor, state_position: Tensor, slots: Tensor, context_lens: Tensor) -> Tensor:
    """[N, H] int64: the tokens that a sequence's buffer holds."""
    position = state_position[slots.clamp(min=0).long()].long()  # [N, H]
    count = (context_lens.long()[:, None] - position).clamp(0, step_buffer.shape[2])
    return count * ((slots >= 0) & (context_lens > 0))[:, None]


def current_state(
    recurrent_state: Tensor,  # [S, H, K, V]
    step_buffer: Tensor | None,  # [S, H, rows, K + V + 4]
    state_position: Tensor | None,  # [S, H]
    slots: Tensor,  # [N]
    context_lens: Tensor,  # [N]
    dtype: torch.dtype,
) -> Tensor:  # [N, H, K, V]
    """The sequences' states with the tokens of their buffers applied, one by one as the recurrence would."""
    acc = acc_dtype(dtype)
    state = gather_state(recurrent_state, slots, context_lens, acc)
    if step_buffer is None or state_position is None:
        return state
    begun = state_position[slots.clamp(min=0).long()] > 0  # [N, H]
    state = torch.where(begun[..., None, None], state, torch.zeros_like(state))
    K, V = recurrent_state.shape[2:]
    count = held_tokens(step_buffer, state_position, slots, context_lens)
    tokens = step_buffer[slots.clamp(min=0).long()].to(acc)  # [N, H, rows, K + V + 4]
    for j in range(int(count.max()) if len(count) else 0):
        kn, delta, g = tokens[:, :, j, :K], tokens[:, :, j, K : K + V], tokens[:, :, j, K + V]
        after = state * by_rows(torch.exp, g)[..., None, None] + kn[..., :, None] * delta[..., None, :]
        state = torch.where((j < count)[..., None, None], after, state)
    return state


def write_state_ref(
    state: Tensor,  # [N, H, K, V]
    recurrent_state: Tensor,
    state_position: Tensor | None,
    slots: Tensor,  # [N]
    position: Tensor,  # [N], the tokens that `state` holds
    chosen: Tensor | None = None,  # [N, H] bool: which of them; all
) -> None:
    """Writes states and their positions, padding rows excepted."""
    live = (slots >= 0)[:, None].expand(state.shape[:2])
    n, h = (live if chosen is None else live & chosen).nonzero(as_tuple=True)
    row = slots.long()[n]
    recurrent_state[row, h] = state[n, h].to(recurrent_state.dtype)
    if state_position is not None:
        state_position[row, h] = position[n].to(state_position.dtype)


def append_ref(
    tokens: Tensor,  # [N, T, H, K + V + 1]: kn | delta | g
    step_buffer: Tensor,
    state_position: Tensor,
    slots: Tensor,  # [N]
    context_lens: Tensor,  # [N]
    chosen: Tensor | None = None,  # [N, H] bool: to which buffers; all
) -> None:
    """Appends T tokens to those that are held, padding rows excepted."""
    count = held_tokens(step_buffer, state_position, slots, context_lens)
    live = (slots >= 0)[:, None].expand(count.shape)
    n, h = (live if chosen is None else live & chosen).nonzero(as_tuple=True)
    row, first = slots.long()[n], count[n, h]
    state_position[row, h] = (context_lens.long()[n] - first).to(state_position.dtype)
    for t in range(tokens.shape[1]):
        at = (first + t).clamp(max=step_buffer.shape[2] - 1)
        step_buffer[row, h, at, : tokens.shape[-1]] = tokens[n, t, h].to(step_buffer.dtype)


def keep_step_ref(
    state: Tensor,  # [N, H, K, V] after the token
    token: Tensor,  # [N, H, K + V + 1]
    recurrent_state: Tensor,
    step_buffer: Tensor | None,
    state_position: Tensor | None,
    slots: Tensor,
    context_lens: Tensor,
    interval: int,
) -> None:
    """What a step of one token leaves behind: the token in the buffer, or the state written."""
    if step_buffer is None or state_position is None:
        write_state_ref(state, recurrent_state, None, slots, context_lens)
        return
    full = held_tokens(step_buffer, state_position, slots, context_lens) + 1 >= interval
    append_ref(token[:, None], step_buffer, state_position, slots, context_lens, ~full)
    write_state_ref(state, recurrent_state, state_position, slots, context_lens + 1, full)


def write_held_ref(
    state: Tensor,  # [N, H, K, V], `current_state`
    recurrent_state: Tensor,
    step_buffer: Tensor,
    state_position: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    interval: int,
) -> None:
    """Writes the states whose buffers hold `interval` tokens or more."""
    full = held_tokens(step_buffer, state_position, slots, context_lens) >= interval
    write_state_ref(state, recurrent_state, state_position, slots, context_lens, full)
