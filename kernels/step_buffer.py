"""A recurrent state that is written every few tokens: the tokens since then are kept beside it.

A state [K, V] of the gated delta rule after tokens 1 .. c, in terms of the state before them:

    state = exp(G) state0 + sum_j exp(G - G_j) kn_j delta_j^T        G_j = g_1 + ... + g_j,  G = G_c

so (kn, delta, g) of the last tokens stand for a state that has not been written. Two pools beside recurrent_state:

    step_buffer     [S, H, rows, K + V + 4] fp32: kn | delta | g | unused (rows start at multiples of 16 bytes)
    state_position  [S, H] int32: the tokens that recurrent_state holds

The token at position p lies in row p - state_position, and c = context_lens - state_position tokens are held. Taking
tokens back is a smaller context_lens in the next call; the pools need nothing. With `interval` L and at most R tokens
in a call of the form VERIFY there are L - 1 + R rows, and L if there are no such calls:

    DECODE, VERIFY c >= L: first the state is written, with the held tokens and none of this call's, which may be taken
                   back; then all tokens of the call are appended
    PREFILL, MIXED sequences of more than one token: their held tokens are applied first, and the call leaves the
                   state written; in MIXED the others are as in DECODE

A sequence with context_lens == 0 holds nothing, whatever the pools say, and a state at position 0 is zero, whatever
its pool holds. Source: ReplaySSM (vllm#47572).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import (
    INTERPRET,
    acc_dtype,
    ask_for,
    by_rows,
    gather_state,
    sequence_bounds,
    slot_of,
    wrap,
)
from jet_export.kernels.configs import current_sm, lookup
from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import EXTRA


def held_buffer(
    step_buffer: Tensor | None, state_position: Tensor | None, interval: int, form: int
) -> tuple[Tensor, Tensor, int] | None:
    """The pools and the interval where an op has them. Raises ValueError for a VERIFY call without."""
    if step_buffer is None or state_position is None:
        if form == Form.VERIFY:
            raise ValueError("a call of the form VERIFY needs a step_buffer, from which its tokens can be taken back")
        return None
    return step_buffer, state_position, int(interval)


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
) -> None:
    """Appends T tokens to those that are held, padding rows excepted."""
    count = held_tokens(step_buffer, state_position, slots, context_lens)
    n, h = (slots >= 0)[:, None].expand(count.shape).nonzero(as_tuple=True)
    row, first = slots.long()[n], count[n, h]
    state_position[row, h] = (context_lens.long()[n] - first).to(state_position.dtype)
    for t in range(tokens.shape[1]):
        at = (first + t).clamp(max=step_buffer.shape[2] - 1)
        step_buffer[row, h, at, : tokens.shape[-1]] = tokens[n, t, h].to(step_buffer.dtype)


def keep_tokens_ref(
    tokens: Tensor,  # [N, T, H, K + V + 1]
    state: Tensor,  # [N, H, K, V] before them, `current_state`
    recurrent_state: Tensor,
    step_buffer: Tensor,
    state_position: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    interval: int,
) -> None:
    """What a DECODE or VERIFY call leaves behind: states whose buffers held `interval` tokens or more are written, and
    the call's tokens appended."""
    full = held_tokens(step_buffer, state_position, slots, context_lens) >= interval
    write_state_ref(state, recurrent_state, state_position, slots, context_lens, full)
    append_ref(tokens, step_buffer, state_position, slots, context_lens)


FEW_BYTES = 2**24  # of states, which L2 is asked for before they are read


def asked_bytes(recurrent_state: Tensor) -> int:
    """Of a head's state, that `ask_for_state` asks for; 0 before SM 9.0, and for states that are no whole lines."""
    size = recurrent_state[0, 0].numel() * recurrent_state.element_size()
    return size if not INTERPRET and (current_sm() or 0) >= 90 and size % 2048 == 0 else 0


@triton.jit
def ask_for_state(recurrent_state, i_head, i, n, N, H: tl.constexpr, BYTES: tl.constexpr, LIMIT: tl.constexpr):
    """0, to be added to an address that is read. Program i of n asks L2 for its share of a head's state of BYTES, which
    only earlier steps have written, unless those of N sequences are more than LIMIT."""
    zero = 0
    if BYTES > 0:
        share = (BYTES // 128 + n - 1) // n * 128
        few = N <= LIMIT // (H * BYTES)
        p_state = recurrent_state.to(tl.int64) + tl.maximum(i_head, 0) * BYTES + i * share
        zero = ask_for(p_state, tl.where(few, tl.minimum(share, BYTES - i * share), 0))
    return zero


@triton.jit
def load_position(p_position, context, ROWS: tl.constexpr):
    """state_position of a head, and how many tokens its buffer of ROWS rows holds, whatever the numbers are."""
    position = tl.where(context > 0, tl.load(p_position), 0)
    return position, tl.minimum(tl.maximum(context - position, 0), ROWS) * (context > 0).to(tl.int32)


@triton.jit
def decays(b_g, m_c):
    """G, the sum of the held tokens' g [BC], and exp(G - G_j) [BC] of each, 0 for rows that hold nothing."""
    b_g = tl.where(m_c, b_g, 0.0)
    b_total = tl.sum(b_g, 0)
    return b_total, tl.where(m_c, tl.exp(b_total - tl.cumsum(b_g, 0)), 0.0)


@triton.jit
def weighted_deltas(
    p_held, count, o_v, m_v, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """exp(G) of a head's `count` held tokens, and exp(G - G_j) delta_j [BV] of each, the last one first; zero for rows
    that hold nothing."""
    since = tl.zeros([], tl.float32)
    deltas = ()
    for i in tl.static_range(ROWS):
        p_row = p_held + (ROWS - 1 - i) * WIDTH + K
        b_delta = tl.load(p_row + o_v, mask=m_v & (ROWS - 1 - i < count), other=0.0)
        deltas = deltas + (b_delta * tl.exp(since),)  # type: ignore[assignment]  # noqa: RUF005
        since += tl.load(p_row + V, mask=ROWS - 1 - i < count, other=0.0)
    return tl.exp(since), deltas


@triton.jit
def stream_rows(
    p_state, p_x, p_held, first, count, decay, deltas, o_v, m_v, begun,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What GROUP rows of the state from `first` on add to state^T x [BV], for each of the N vectors x [K] from p_x on,
    in one pass, BR whole rows at once. Of two warps a thread sums columns of its own, in registers.

    With ROWS > 0 the rows are written on the way as decay * state + sum_j kn_j delta_j^T, of `weighted_deltas`. begun:
    whether the state is read; otherwise it is zero."""
    o_r = tl.arange(0, BR)
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros([o_v.shape[0]], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for i_k in range(0, GROUP, BR):
        o_k = first + i_k + o_r
        m_k = (i_k + o_r < GROUP) & (o_k < K)
        m = m_k[:, None] & m_v[None, :]
        p_rows = p_state + o_k[:, None] * V + o_v[None, :]
        b_rows = tl.load(p_rows, mask=m & begun, other=0.0).to(tl.float32)
        more = ()
        for i in tl.static_range(N):
            b_x = tl.load(p_x + i * K + o_k, mask=m_k, other=0.0)
            more = more + (sums[i] + tl.sum(b_rows * b_x[:, None], 0),)  # type: ignore[assignment]  # noqa: RUF005
        sums = more
        if ROWS > 0:
            b_rows *= decay
            for i in tl.static_range(ROWS):
                b_k = tl.load(p_held + (ROWS - 1 - i) * WIDTH + o_k, mask=m_k & (ROWS - 1 - i < count), other=0.0)
                b_rows += b_k[:, None] * deltas[i][None, :]
            tl.store(p_rows, b_rows.to(p_state.dtype.element_ty), mask=m)
    return sums


@triton.jit
def stream_state(
    p_state, p_x, p_parts, p_held, count, decay, deltas, o_v, m_v, begun, i, n,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`stream_rows` of program i's share of the state, as one of n. The rows are cut into GROUPS, whose sums are added
    in their order, so that n does not change a bit: in registers where n is 1, and otherwise left in p_parts
    [GROUPS, N, V] for `sum_parts`."""
    GROUP: tl.constexpr = (K + GROUPS - 1) // GROUPS
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros([o_v.shape[0]], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for group in range(i, GROUPS, n):
        parts = stream_rows(
            p_state, p_x, p_held, group * GROUP, count, decay, deltas, o_v, m_v, begun, N, K, V, ROWS, WIDTH, GROUP, BR
        )
        if GROUPS == 1:
            sums = parts
        else:
            more = ()
            for j in tl.static_range(N):
                if n > 1:
                    tl.store(p_parts + (group * N + j) * V + o_v, parts[j], mask=m_v)
                more = more + (sums[j] + parts[j],)  # type: ignore[assignment]  # noqa: RUF005
            sums = more
    return sums


@triton.jit
def sum_parts(p_parts, o_v, m_v, N: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr):
    """The sums of `stream_state`, from all programs' parts."""
    sums = ()
    for j in tl.static_range(N):
        b_sum = tl.zeros([o_v.shape[0]], tl.float32)
        for group in tl.static_range(GROUPS):
            b_sum += tl.load(p_parts + (group * N + j) * V + o_v, mask=m_v, other=0.0, cache_modifier=".cg")
        sums = sums + (b_sum,)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit(do_not_specialize=["T", "S"])
def flush_kernel(
    recurrent_state, step_buffer, state_position, cu_seqlens, slots, context_lens, T, S,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BV: tl.constexpr, BR: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Grid (H, N). Applies the held tokens of sequences that the chunk kernels take next, and sets state_position to
    where those leave the state. MIXED: sequences of one token are left out."""
    i_h = tl.program_id(0)
    i_n = tl.program_id(1)
    slot = slot_of(slots, i_n, S)
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    if (slot < 0) | (MIXED and eos - bos == 1):
        return
    context = tl.load(context_lens + i_n)
    i_head = slot * H + i_h
    position, count = load_position(state_position + i_head, context, ROWS)
    if count > 0:
        p_state, p_held = recurrent_state + i_head * (K * V), step_buffer + i_head * (ROWS * WIDTH)
        o_v = tl.arange(0, BV)
        decay, deltas = weighted_deltas(p_held, count, o_v, o_v < V, K, V, ROWS, WIDTH)
        stream_rows(
            p_state, p_held, p_held, 0, count, decay, deltas, o_v, o_v < V, position > 0, 0, K, V, ROWS, WIDTH, K, BR
        )
    tl.debug_barrier()  # every thread has read the old position
    tl.store(state_position + i_head, tl.maximum(context, 0) + eos - bos)


def flush_triton(
    recurrent_state: Tensor,
    step_buffer: Tensor,
    state_position: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    num_tokens: int,
    mixed: bool,
) -> None:
    """Launches `flush_kernel`; `mixed`: sequences of one token are left out."""
    (S, H, K, V), held = recurrent_state.shape, step_buffer.shape[2]
    use = lookup("delta_rule_deferred", state_dtype=recurrent_state.dtype, head_k_dim=K, head_v_dim=V, tokens=1)
    wrap(flush_kernel)[(H, slots.shape[0])](
        recurrent_state, step_buffer, state_position, cu_seqlens, slots, context_lens, num_tokens, S,
        H=H, K=K, V=V, ROWS=held, WIDTH=K + V + EXTRA, BV=triton.next_power_of_2(V), MIXED=mixed,
        BR=use["BR"], num_warps=use["num_warps"],
    )  # fmt: skip
