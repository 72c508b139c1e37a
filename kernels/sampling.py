"""Sampling: the next token of every row of logits, whatever mix of settings the rows have, in two launches.

For a row of logits x [V] with the settings of its slot (sampling_ref.py is the same in NumPy):

    x' = penalties(x) + bias, -inf where masked    repetition r: x / r if x > 0 else x r, of tokens in the prompt or
                                                   output; then x - presence [n > 0] - frequency n, n the token's
                                                   count in the output
    y  = x' / temperature                          temperature below 1e-5: greedy, y = x' and no noise
    K  = {v: y_v >= the top_k-th largest y}        ties with the top_k-th stay
    M  = {v in K: y_v >= max y + ln min_p}
    S  = {v in M: P_M(y > y_v) < top_p}            P_M: softmax over M. The token that crosses top_p stays, and those
                                                   that tie with it
    token = argmax over S of y_v + g_v             g_v = -ln(-ln u_v), Gumbel noise: a draw from softmax over S

u_v is word v mod 4 of Philox-4x32-10 with the key `seed` and the counter (v div 4, position, choice, 0), position being
the number of tokens that the request has made: given equal logits, a request's tokens depend neither on the rows beside
it nor on the order of steps. Ties of y + g go to the lower token. S is an upper set of y, so a draw from a larger upper
set that lies in S is the draw from S: filters need no sort, only a threshold that rises until the draw lies above it.
Masses are compared as integers, exp(y - max y) in units of 2^-36, whose sums no order changes.

A row with a NaN, without a finite maximum, or masked as a whole gives the token -1.

Sources: Gumbel-max trick (Gumbel 1954; arXiv 1611.00712); Philox (Salmon et al., SC11); rising thresholds (FlashInfer's
sorting-free sampling, arXiv 2501.01005).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.sampling_ref import MAX_BLOCKED, SamplerState

LISTED = 4096  # tokens that top_k may leave for a list


@triton.jit
def ordered_bits(x):
    """fp32 -> int32 of the same order, equal values (both zeros too) having equal bits."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def noise(b_word):
    """Gumbel noise of random words, fp32."""
    b_w = (b_word.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    # -ln(1 - w): by its series where 1 - w would round away what tells small w apart, which are the winners
    b_series = b_w * (1.0 + b_w * (0.5 + b_w * (1.0 / 3.0 + b_w * (0.25 + b_w * 0.2))))
    b_e = tl.where(b_w < 0.03125, b_series, -tl.log(tl.maximum(1.0 - b_w, 2.98e-8)))
    return -tl.log(b_e)


@triton.jit
def words(seed, position, choice, o_group):
    """The four words of each group of four tokens."""
    zero = tl.zeros_like(o_group).to(tl.uint32)
    return tl.philox(seed, o_group.to(tl.uint32), zero + position.to(tl.uint32), zero + choice.to(tl.uint32), zero)


@triton.jit
def gumbel(seed, position, choice, i_group, BG: tl.constexpr):
    """[4 BG] fp32: noise of the tokens 4 i_group to 4 (i_group + BG)."""
    r0, r1, r2, r3 = words(seed, position, choice, i_group + tl.arange(0, BG))
    return noise(tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [4 * BG]))


@triton.jit
def gumbel_of(seed, position, choice, b_token):
    """Noise of any tokens."""
    r0, r1, r2, r3 = words(seed, position, choice, b_token // 4)
    i = b_token % 4
    return noise(tl.where(i == 0, r0, tl.where(i == 1, r1, tl.where(i == 2, r2, r3))))


@triton.jit
def processed_tile(
    p_logits, p_counts, p_seen, p_bias, p_allowed, p_blocked, p_fed,
    o_v, m_v, repetition, presence, frequency, flags, block_some, i_n, between,
    MAX_BLOCKED: tl.constexpr,
):  # fmt: skip
    """The raw logits of some tokens and x' of them, fp32; -inf past the vocabulary. The output has `between` more
    tokens, those of p_fed up to row i_n."""
    b_raw = tl.load(p_logits + o_v, mask=m_v, other=-float("inf")).to(tl.float32)
    b_x = b_raw
    if (flags & 1) != 0:
        b_n = tl.load(p_counts + o_v, mask=m_v, other=0)
        for i in range(between):
            b_n += (o_v == tl.load(p_fed + tl.maximum(i_n - i, 0))).to(tl.int32)
        b_seen = (b_n > 0) | (tl.load(p_seen + o_v, mask=m_v, other=0) != 0)
        b_x = tl.where(b_seen, tl.where(b_x > 0, b_x / repetition, b_x * repetition), b_x)
        b_x = b_x - tl.where(b_n > 0, presence, 0.0) - frequency * b_n.to(tl.float32)
    if (flags & 2) != 0:
        b_x += tl.load(p_bias + o_v, mask=m_v, other=0.0)
    if block_some:
        for i in tl.static_range(MAX_BLOCKED):
            b_x = tl.where(o_v == tl.load(p_blocked + i), -float("inf"), b_x)
    if (flags & 4) != 0:
        b_word = tl.load(p_allowed + o_v // 32, mask=m_v, other=0)
        b_x = tl.where(((b_word >> (o_v % 32)) & 1) != 0, b_x, -float("inf"))
    return b_raw, tl.where(m_v, b_x, -float("inf"))


@triton.jit(do_not_specialize=["stride_mask"])
def sample_tiles_kernel(
    logits, slots, ahead, fed, floats, ints, counts, seen, bias, allowed, blocked,
    values, tokens, y_of_best, y_max, raw_max, raw_sum, bad, y_out, part_max,
    stride_logits, stride_mask,
    V: tl.constexpr, NUM_TILES: tl.constexpr, PARTS: tl.constexpr, BG: tl.constexpr, MAX_BLOCKED: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of 4 BG tokens, N): each tile's draw over all its tokens, its largest y, and what logprobs need."""
    i_tile = tl.program_id(0)
    i_n = tl.program_id(1)
    slot = tl.load(slots + i_n).to(tl.int64)
    p_f = floats + slot * 6
    p_i = ints + slot * 6
    temperature = tl.load(p_f)
    seed, position, choice = tl.load(p_i), tl.load(p_i + 1), tl.load(p_i + 2)
    between = 0
    if AHEAD:
        between = tl.load(ahead + i_n)
        position += between
    flags = tl.load(p_i + 5).to(tl.int32)
    if stride_mask == 0:
        flags = flags & 3
    o_v = i_tile * 4 * BG + tl.arange(0, 4 * BG)
    m_v = o_v < V
    b_raw, b_x = processed_tile(
        logits + i_n.to(tl.int64) * stride_logits, counts + slot * V, seen + slot * V, bias + slot * V,
        allowed + i_n.to(tl.int64) * stride_mask, blocked + slot * MAX_BLOCKED, fed,
        o_v, m_v, tl.load(p_f + 3), tl.load(p_f + 4), tl.load(p_f + 5), flags,
        position < tl.load(p_i + 4), i_n, between, MAX_BLOCKED,
    )  # fmt: skip
    greedy = temperature < 1e-5
    b_y = b_x / tl.where(greedy, 1.0, temperature)
    b_drawn = b_y
    if not greedy:
        b_drawn = b_y + gumbel(seed, position, choice, i_tile * BG, BG)
    filtered = (tl.load(p_i + 3) > 0) | (tl.load(p_f + 1) < 1.0) | (tl.load(p_f + 2) > 0.0)
    if filtered & (not greedy):
        tl.store(y_out + i_n.to(tl.int64) * V + o_v, b_y, mask=m_v)
        o_part = (i_n * NUM_TILES + i_tile) * PARTS + tl.arange(0, PARTS)
        tl.store(part_max + o_part, tl.max(tl.reshape(b_y, [PARTS, 4 * BG // PARTS]), 1))
    at = i_n * NUM_TILES + i_tile
    best, i_best = tl.max(b_drawn, 0, return_indices=True, return_indices_tie_break_left=True)
    top = tl.max(b_raw, 0)
    tl.store(values + at, best)
    tl.store(tokens + at, i_tile * 4 * BG + i_best)
    tl.store(y_of_best + at, tl.max(tl.where(o_v == i_tile * 4 * BG + i_best, b_y, -float("inf")), 0))
    tl.store(y_max + at, tl.max(b_y, 0))
    tl.store(raw_max + at, top)
    tl.store(raw_sum + at, tl.sum(tl.where(m_v, tl.exp(b_raw - top), 0.0), 0))
    tl.store(bad + at, tl.max(((b_raw != b_raw) & m_v).to(tl.int32), 0))


@triton.jit
def masses(p_y, n, least, above, top, BV: tl.constexpr):
    """The mass of the tokens whose ordered bits are at least `least`, and of those that exceed `above`: int64, in units
    of 2^-36 of the most likely one's."""
    b_all = tl.zeros([BV], tl.int64)
    b_above = tl.zeros([BV], tl.int64)
    for i in tl.range(0, tl.cdiv(n, BV), num_stages=3):
        o_v = i * BV + tl.arange(0, BV)
        b_y = tl.load(p_y + o_v, mask=o_v < n, other=-float("inf"))
        b_m = (tl.exp(b_y - top) * 68719476736.0).to(tl.int64)
        b_bits = ordered_bits(b_y)
        b_all += tl.where(b_bits >= least, b_m, 0)
        b_above += tl.where(b_bits > above, b_m, 0)
    return tl.sum(b_all, 0), tl.sum(b_above, 0)


@triton.jit
def kth_largest(p_y, k, n, BV: tl.constexpr):
    """The ordered bits of the k-th largest of n values, a byte at a time from the top; 1 <= k <= n."""
    prefix = tl.zeros([], tl.int32)
    left = k.to(tl.int32)
    o_bin = tl.arange(0, 256)
    for level in range(4):
        shift = 24 - 8 * level
        known = tl.where(level == 0, 0, -(1 << tl.minimum(shift + 8, 30)))  # the bytes that are settled
        b_count = tl.zeros([256], tl.int32)
        for i in range(0, tl.cdiv(n, BV)):
            o_v = i * BV + tl.arange(0, BV)
            b_y = tl.load(p_y + o_v, mask=o_v < n, other=-float("inf"))
            b_u = ordered_bits(b_y) ^ -2147483648  # of the order of unsigned integers
            m = (o_v < n) & ((b_u & known) == (prefix & known))
            b_count += tl.histogram((b_u >> shift) & 255, 256, mask=m)
        b_from = tl.cumsum(b_count, 0, reverse=True)  # values with this byte or a larger one
        byte = tl.max(tl.where(b_from >= left, o_bin, 0), 0)
        left -= tl.sum(tl.where(o_bin > byte, b_count, 0), 0)
        prefix = prefix | (byte << shift)
    return prefix ^ -2147483648


@triton.jit
def list_from(p_y, p_listed, p_token, least, V: tl.constexpr, LISTED: tl.constexpr, BV: tl.constexpr):
    """Lists the tokens whose ordered bits are at least `least`, up to LISTED of them; returns how many there are."""
    n = tl.zeros([], tl.int32)
    for i in tl.range(0, tl.cdiv(V, BV), num_stages=3):
        o_v = i * BV + tl.arange(0, BV)
        b_y = tl.load(p_y + o_v, mask=o_v < V, other=-float("inf"))
        m = (ordered_bits(b_y) >= least) & (o_v < V)
        found = tl.sum(m.to(tl.int32), 0)
        if found != 0:
            o_to = n + tl.cumsum(m.to(tl.int32), 0) - 1
            m = m & (o_to < LISTED)
            tl.store(p_listed + o_to, b_y, mask=m)
            tl.store(p_token + o_to, o_v, mask=m)
            n += found
    tl.debug_barrier()  # the list is read by other threads
    return n


@triton.jit
def draw_from(p_y, least, seed, position, choice, V: tl.constexpr, BG: tl.constexpr):
    """The draw from the tokens whose ordered bits are at least `least`: its token, and the ordered bits of its y."""
    best = tl.full([], -float("inf"), tl.float32)
    token = tl.full([], -1, tl.int32)
    bits = tl.zeros([], tl.int32)
    for i in tl.range(0, tl.cdiv(V, 4 * BG), num_stages=3):
        o_v = i * 4 * BG + tl.arange(0, 4 * BG)
        b_y = tl.load(p_y + o_v, mask=o_v < V, other=-float("inf"))
        b_bits = ordered_bits(b_y)
        m = (b_bits >= least) & (o_v < V)
        if tl.max(m.to(tl.int32), 0) != 0:
            b_drawn = tl.where(m, b_y + gumbel(seed, position, choice, i * BG, BG), -float("inf"))
            tile, i_tile = tl.max(b_drawn, 0, return_indices=True, return_indices_tie_break_left=True)
            if tile > best:
                best = tile
                token = i * 4 * BG + i_tile
                bits = tl.max(tl.where(o_v == token, b_bits, -2147483648), 0)
    return token, bits


@triton.jit
def draw_listed(p_listed, p_token, n, least, seed, position, choice, BV: tl.constexpr):
    """`draw_from` over a list of n tokens."""
    best = tl.full([], -float("inf"), tl.float32)
    token = tl.full([], -1, tl.int32)
    bits = tl.zeros([], tl.int32)
    for i in range(0, tl.cdiv(n, BV)):
        o_i = i * BV + tl.arange(0, BV)
        b_y = tl.load(p_listed + o_i, mask=o_i < n, other=-float("inf"))
        b_token = tl.load(p_token + o_i, mask=o_i < n, other=0)
        b_bits = ordered_bits(b_y)
        m = (b_bits >= least) & (o_i < n)
        b_drawn = tl.where(m, b_y + gumbel_of(seed, position, choice, b_token), -float("inf"))
        tile, i_tile = tl.max(b_drawn, 0, return_indices=True, return_indices_tie_break_left=True)
        if tile > best:
            best = tile
            at = o_i == i * BV + i_tile
            token = tl.sum(tl.where(at, b_token, 0), 0)
            bits = tl.max(tl.where(at, b_bits, -2147483648), 0)
    return token, bits


@triton.jit
def room_of(total, top_p):
    """The mass that may lie above a token of the support; at least 1, for the most likely token stays."""
    return tl.maximum((total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def sample_rows_kernel(
    slots, ahead, floats, ints, counts, values, tokens, y_of_best, y_max, raw_max, raw_sum, bad, y_out, part_max,
    listed, listed_token, last_tokens, out, out_lse,
    V: tl.constexpr, NUM_TILES: tl.constexpr, PARTS: tl.constexpr, LISTED: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BG: tl.constexpr, BL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid (N): merges a row's tiles, applies its filters, and moves its slot on by one token unless AHEAD.

    top_k goes through a list: the k-th largest of the parts' maxima is no larger than the k-th largest y, and little is
    above it unless a great many tie; then, and for a k beyond the number of parts, the whole row is searched.
    """
    i_n = tl.program_id(0)
    slot = tl.load(slots + i_n).to(tl.int64)
    p_f = floats + slot * 6
    p_i = ints + slot * 6
    p_y = y_out + i_n.to(tl.int64) * V
    o_t = tl.arange(0, BT)
    m_t = o_t < NUM_TILES
    at = i_n * NUM_TILES + o_t
    _, i_best = tl.max(
        tl.load(values + at, mask=m_t, other=-float("inf")), 0, return_indices=True, return_indices_tie_break_left=True
    )
    token = tl.load(tokens + i_n * NUM_TILES + i_best)
    top = tl.max(tl.load(y_max + at, mask=m_t, other=-float("inf")), 0)
    wrong = tl.max(tl.load(bad + at, mask=m_t, other=0), 0) != 0
    wrong = wrong | (top == float("inf")) | (top == -float("inf")) | (top != top)
    position = tl.load(p_i + 1)
    if AHEAD:
        position += tl.load(ahead + i_n)
    top_k, top_p, min_p = tl.load(p_i + 3), tl.load(p_f + 1), tl.load(p_f + 2)
    by_k = (top_k > 0) & (top_k < V)
    filtered = by_k | (top_p < 1.0) | (min_p > 0.0)
    if filtered & (tl.load(p_f) >= 1e-5) & (not wrong):
        seed, choice = tl.load(p_i), tl.load(p_i + 2)
        bits = ordered_bits(tl.load(y_of_best + i_n * NUM_TILES + i_best))
        least = ordered_bits(tl.full([], -3.4028234663852886e38, tl.float32))
        if min_p > 0.0:
            least = tl.maximum(least, ordered_bits(top + tl.log(min_p)))
        p_listed = listed + i_n * LISTED
        p_token = listed_token + i_n * LISTED
        n = tl.zeros([], tl.int32)
        if by_k & (top_k <= NUM_TILES * PARTS):
            above_k = kth_largest(part_max + i_n * NUM_TILES * PARTS, top_k, NUM_TILES * PARTS, BL)
            n = list_from(p_y, p_listed, p_token, tl.maximum(least, above_k), V, LISTED, BV)
        if (n > 0) & (n <= LISTED):
            if n >= top_k:  # fewer where min_p has taken some away
                least = tl.maximum(least, kth_largest(p_listed, top_k, n, BL))
            if bits < least:
                token, bits = draw_listed(p_listed, p_token, n, least, seed, position, choice, BL)
            if top_p < 1.0:
                total, above = masses(p_listed, n, least, bits, top, BL)
                while above >= room_of(total, top_p):
                    token, bits = draw_listed(p_listed, p_token, n, bits + 1, seed, position, choice, BL)
                    total, above = masses(p_listed, n, least, bits, top, BL)
        else:
            if by_k:
                least = tl.maximum(least, kth_largest(p_y, top_k, V, BV))
            if bits < least:
                token, bits = draw_from(p_y, least, seed, position, choice, V, BG)
            if top_p < 1.0:
                total, above = masses(p_y, V, least, bits, top, BV)
                while above >= room_of(total, top_p):
                    token, bits = draw_from(p_y, bits + 1, seed, position, choice, V, BG)
                    total, above = masses(p_y, V, least, bits, top, BV)
    b_top = tl.load(raw_max + at, mask=m_t, other=-float("inf"))
    raw = tl.max(b_top, 0)
    total_raw = tl.sum(tl.load(raw_sum + at, mask=m_t, other=0.0) * tl.exp(b_top - raw), 0)
    tl.store(out_lse + i_n, raw + tl.log(total_raw))
    tl.store(out + i_n, tl.where(wrong, -1, token).to(tl.int64))
    if not AHEAD:
        tl.store(last_tokens + slot, tl.maximum(tl.where(wrong, 0, token), 0).to(tl.int64))
        tl.store(p_i + 1, position + 1)
        if ((tl.load(p_i + 5) & 1) != 0) & (not wrong):
            tl.store(counts + slot * V + token, tl.load(counts + slot * V + token) + 1)


def sample_triton(
    state: SamplerState,
    logits: Tensor,  # [N, V], rows contiguous
    slots: Tensor,  # [N] int32, each at most once without `ahead`
    allowed: Tensor | None = None,  # [N, cdiv(V, 32)] int32: bit v of a row is set where token v may come
    ahead: Tensor | None = None,  # [N] int32: draw for the position so many tokens behind the slot's next one
    fed: Tensor | None = None,  # [N] int32, with `ahead`: the token that a row's logits follow, -1: it is not known
) -> tuple[Tensor, Tensor]:
    """(tokens [N] int64, ln of the sum of exp of the raw logits [N] fp32); each slot moves on by one token.

    With `ahead` no slot moves. The tokens in between, which count for penalties, are those of `fed` in this row and the
    ones above it: a slot's rows follow each other, from its next position on.
    Launches the two kernels. Nothing synchronises.
    """
    N, V = logits.shape
    groups = triton.next_power_of_2(triton.cdiv(V, 4))
    BG = min(512, groups)  # groups of four tokens in a tile
    tiles, parts = triton.cdiv(V, 4 * BG), min(16, 4 * BG)
    partial = logits.new_empty(5, N, tiles, dtype=torch.float32)
    index = logits.new_empty(2, N, tiles, dtype=torch.int32)
    y_out, part_max = (logits.new_empty(N, n, dtype=torch.float32) for n in (V, tiles * parts))
    listed, listed_token = (logits.new_empty(N, LISTED, dtype=d) for d in (torch.float32, torch.int32))
    out, lse = logits.new_empty(N, dtype=torch.int64), logits.new_empty(N, dtype=torch.float32)
    mask = slots if allowed is None else allowed
    assert (ahead is None) == (fed is None)
    behind, between = slots if ahead is None else ahead, slots if fed is None else fed
    values, y_of_best, y_max, raw_max, raw_sum = partial
    sample_tiles_kernel[(tiles, N)](
        logits, slots, behind, between, state.floats, state.ints, state.counts, state.seen, state.bias, mask,
        state.blocked, values, index[0], y_of_best, y_max, raw_max, raw_sum, index[1], y_out, part_max,
        logits.stride(0), 0 if allowed is None else allowed.stride(0),
        V=V, NUM_TILES=tiles, PARTS=parts, BG=BG, MAX_BLOCKED=MAX_BLOCKED,
        AHEAD=ahead is not None, num_warps=4,
    )  # fmt: skip
    sample_rows_kernel[(N,)](
        slots, behind, state.floats, state.ints, state.counts, values, index[0], y_of_best, y_max, raw_max, raw_sum,
        index[1], y_out, part_max, listed, listed_token, state.last_tokens, out, lse,
        V=V, NUM_TILES=tiles, PARTS=parts, LISTED=LISTED, BT=triton.next_power_of_2(tiles),
        BV=min(8192, 4 * groups), BG=min(1024, groups), BL=2048,
        AHEAD=ahead is not None, num_warps=16,
    )  # fmt: skip
    return out, lse
