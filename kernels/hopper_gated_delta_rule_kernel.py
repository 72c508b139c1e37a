"""The kernel of hopper_gated_delta_rule.py, which says what it does and imports this when launched: not every Triton
has Gluon.

Barriers. `ready[c % STAGES]` completes for the (c // STAGES + 1)th time once chunk c is prepared (one arrival);
`done[c % STAGES]` once every scan is past c (one arrival each), after which its buffers may be written. A preparer of c
waits for done of c - 3 and c - 2 only, whose ready came before c's turn; a scan of c waits for ready of c only: nobody
waits in a circle. Chunk c + STAGES is not prepared before c is done, so that a barrier is never two completions ahead
of who waits for it, and the parity of c // STAGES is enough.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from jet_export.kernels.common import sequence_bounds, slot_of, softplus

BT = gl.constexpr(64)  # tokens of a chunk
BV = gl.constexpr(64)  # columns of V a scan
BK = gl.constexpr(128)
LOG2_E = gl.constexpr(1.4426950408889634)

# Gates: two tokens a lane, all of a chunk in every warp
TOKENS = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
# Copies of 16 bytes a lane
WIDE_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
# Results of wgmma, and its left operands
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
WIDE_MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
WIDE_LEFT = gl.constexpr(gl.DotOperandLayout(0, WIDE_MMA.value, 2))
# A 16 x 16 block a warp, in the registers in which MMA has the diagonal blocks
BLOCK = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
BLOCK_LEFT = gl.constexpr(gl.DotOperandLayout(0, BLOCK.value, 2))
BLOCK_RIGHT = gl.constexpr(gl.DotOperandLayout(1, BLOCK.value, 2))
BLOCKS = gl.constexpr(  # MMA as [4, 16, 4, 16]
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 8, 0, 0], [0, 0, 0, 8], [0, 0, 1, 0], [0, 0, 2, 0]],
        [[0, 0, 0, 2], [0, 0, 0, 4], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        [[1, 0, 0, 0], [2, 0, 0, 0]],
        [],
        [4, 16, 4, 16],
    )
)
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())


@gluon.jit
def opaque_zero():
    """0, unknown to the compiler, which would keep in registers, and spill, whatever addresses do not change."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def quick_silu(x):
    """As gated_delta_rule_chunk.quick_silu."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 e;
        mul.f32 e, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 e, e;
        mul.f32 $0, $1, e;
        }""",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def l2_normalise(x, SCALE: gl.constexpr, SILU: gl.constexpr):
    """Rows SCALE x / sqrt(sum(x^2) + 1e-6) in fp32; of silu(x) with SILU."""
    x = x.to(gl.float32)
    if SILU:
        x = quick_silu(x)
    scale = gl.rsqrt(gl.sum(x * x, 1) + 1e-6) * SCALE
    return x * gl.expand_dims(scale, 1)


@gluon.jit
def block_product(a, b_t):
    """a b of blocks [4, 16, 16] as fp16 numbers. b_t is b transposed, which has the registers of a right operand."""
    left = gl.convert_layout(a.to(gl.float16), BLOCK_LEFT, assert_trivial=True)
    right = gl.convert_layout(gl.permute(b_t.to(gl.float16), (0, 2, 1)), BLOCK_RIGHT, assert_trivial=True)
    return mma_v2(left, right, gl.full([4, 16, 16], 0.0, gl.float32, BLOCK))


@gluon.jit
def diagonal_inverses(A, same):
    """The inverses of the four diagonal blocks of 16 of I - A, as [64, 64]: within each warp's registers.

    X + X L X as in `unit_lower_inverse`, with X^T kept beside X for the right operands."""
    blocks = gl.convert_layout(gl.reshape(gl.where(same, A, 0.0), [4, 16, 4, 16]), BLOCKS, assert_trivial=True)
    A = gl.convert_layout(gl.sum(blocks, 2), BLOCK, assert_trivial=True)
    o_i = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, BLOCK))), 0), 2)
    o_i += opaque_zero()
    o_j = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, BLOCK))), 0), 1)
    X = gl.where(o_i == o_j, 1.0, 0.0) + gl.full([4, 16, 16], 0.0, gl.float32, BLOCK)
    X_t = X
    for level in gl.static_range(4):
        half_i, half_j = o_i // 2**level, o_j // 2**level
        L = gl.where((half_i // 2 == half_j // 2) & (half_i > half_j), A, 0.0)
        LX_t = block_product(X_t, L)
        change, change_t = block_product(X, LX_t), block_product(LX_t, X)
        X, X_t = X + change, X_t + change_t
    X = gl.expand_dims(gl.convert_layout(X, gl.SliceLayout(2, BLOCKS), assert_trivial=True), 2)
    X = gl.reshape(X + gl.full([4, 16, 4, 16], 0.0, gl.float32, BLOCKS), [64, 64])
    return gl.where(same, gl.convert_layout(X, MMA, assert_trivial=True), 0.0)


@gluon.jit
def unit_lower_inverse(A, o_i, o_j, scratch):
    """(I - A)^-1 of A's part below the diagonal by products of fp16 numbers: gated_delta_rule_chunk.unit_lower_inverse,
    whose A is -A here. scratch: fp16 [64, 64]."""
    X = diagonal_inverses(A, o_i // 16 == o_j // 16)
    for level in gl.static_range(4, 6):
        half_i, half_j = o_i // 2**level, o_j // 2**level
        L = gl.where((half_i // 2 == half_j // 2) & (half_i > half_j), A, 0.0).to(gl.float16)
        scratch.store(X.to(gl.float16))
        fence_async_shared()
        LX = warpgroup_mma(gl.convert_layout(L, LEFT), scratch, gl.full([64, 64], 0.0, gl.float32, MMA), use_acc=False)
        scratch.store(LX.to(gl.float16))
        fence_async_shared()
        X = warpgroup_mma(gl.convert_layout(X.to(gl.float16), LEFT), scratch, X)
    return X


@gluon.jit
def load_gates(p_b, p_g, stride_b, stride_g, n_t):
    """beta and g, or their projections, of a chunk's n_t tokens, as they are."""
    o_t = gl.arange(0, BT, TOKENS) + opaque_zero()
    b = gl.load(p_b + o_t * stride_b, mask=o_t < n_t, other=0.0)
    return b, gl.load(p_g + o_t * stride_g, mask=o_t < n_t, other=0.0)


@gluon.jit
def copy_rows(p, stride, n_t, buffer, LAYOUT: gl.constexpr):
    """Starts the copy of a chunk's n_t rows [BT, columns]; the rows beyond become zero."""
    o_t = gl.expand_dims(gl.arange(0, BT, gl.SliceLayout(1, LAYOUT)), 1) + opaque_zero()
    o_c = gl.expand_dims(gl.arange(0, buffer.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    async_copy.async_copy_global_to_shared(buffer, p + o_t * stride + o_c, mask=(o_t < n_t) & (o_c >= 0))


@gluon.jit
def copy_chunk(inputs, buffers, c, n_tokens, STAGES: gl.constexpr, SCANS: gl.constexpr):
    """Starts the copies of chunk c's q, k and v into its stage."""
    p_q, p_k, p_v, stride_q, stride_k, stride_v = inputs
    b_q, b_k, b_v = buffers
    row, stage, n_t = c.to(gl.int64) * BT, c % STAGES, n_tokens - c * BT
    copy_rows(p_k + row * stride_k, stride_k, n_t, b_k.index(stage), WIDE_ROWS)
    copy_rows(p_q + row * stride_q, stride_q, n_t, b_q.index(stage), WIDE_ROWS)
    for i in gl.static_range(SCANS):
        copy_rows(p_v + row * stride_v + i * BV, stride_v, n_t, b_v[i].index(stage), ROWS)
    async_copy.commit_group()


@gluon.jit
def wait_done(done, c, pred, STAGES: gl.constexpr):
    """Until the scans are past chunk c >= -STAGES."""
    c += STAGES
    mbarrier.wait(done.index(c % STAGES), (c // STAGES + 1) & 1, pred=pred)


@gluon.jit
def prepare(
    ins, FIRST: gl.constexpr, PREPARES: gl.constexpr, SCANS: gl.constexpr, STAGES: gl.constexpr, MIDDLE: gl.constexpr,
    RAW: gl.constexpr, SILU: gl.constexpr,
):  # fmt: skip
    """Chunks FIRST, FIRST + PREPARES, ... of n_tokens tokens."""
    inputs, gates, buffers, middle, ready, done, n_tokens = ins
    p_b, p_g, stride_b, stride_g, A_log, dt_bias, i_h = gates
    b_q, b_k, _ = buffers
    solve, attn, decay_in, decay_out, keep = middle
    dtype: gl.constexpr = b_q.dtype
    s_G = gl.allocate_shared_memory(gl.float32, [BT], PLAIN)
    s_beta = gl.allocate_shared_memory(gl.float32, [BT], PLAIN)
    if RAW:
        rate = -gl.exp(gl.load(A_log + i_h).to(gl.float32))
        bias = gl.load(dt_bias + i_h).to(gl.float32)
    first = n_tokens * 0 + FIRST
    copy_chunk(inputs, buffers, first, n_tokens, STAGES, SCANS)
    raw_b, raw_g = load_gates(
        p_b + first.to(gl.int64) * BT * stride_b, p_g + first.to(gl.int64) * BT * stride_g, stride_b, stride_g,
        n_tokens - first * BT,
    )  # fmt: skip
    for c in range(first, gl.cdiv(n_tokens, BT), PREPARES):
        stage, mid, n_t = c % STAGES, c % MIDDLE, n_tokens - c * BT
        m_t = gl.arange(0, BT, TOKENS) < n_t
        b_beta, b_g = raw_b.to(gl.float32), raw_g.to(gl.float32)
        if RAW:
            b_beta = (1.0 / (1.0 + gl.exp(-b_beta))).to(dtype).to(gl.float32)
            b_g = rate * softplus(b_g + bias)
        b_beta, b_g = gl.where(m_t, b_beta, 0.0), gl.where(m_t, b_g * LOG2_E, 0.0)
        b_G = gl.associative_scan(b_g, 0, add)
        b_last = gl.sum(b_g, 0)

        if PREPARES == 1:
            wait_done(done, c - 2, c >= 2, STAGES)
            copy_chunk(inputs, buffers, c + 1, n_tokens, STAGES, SCANS)
        else:
            wait_done(done, c - 3, c >= 3, STAGES)
        later = (c + PREPARES).to(gl.int64) * BT
        raw_b, raw_g = load_gates(
            p_b + later * stride_b, p_g + later * stride_g, stride_b, stride_g, n_t - PREPARES * BT
        )
        s_G.store(b_G)
        s_beta.store(b_beta)
        decay_in.index(mid).store(-exp2(b_G))
        decay_out.index(mid).store(exp2(b_last - b_G))
        keep.index(mid).store(exp2(b_last + gl.full([1], 0.0, gl.float32, TOKENS)))
        async_copy.wait_group(1 if PREPARES == 1 else 0)

        k, q = b_k.index(stage), b_q.index(stage)
        k.store(l2_normalise(k.load(WIDE_MMA), 1.0, SILU).to(dtype))
        b_q_n = l2_normalise(q.load(WIDE_MMA), BK**-0.5, SILU)
        decay = -decay_in.index(mid).load(gl.SliceLayout(1, WIDE_MMA))
        q.store((b_q_n * gl.expand_dims(decay, 1)).to(dtype))
        left = gl.convert_layout(b_q_n.to(dtype), WIDE_LEFT)
        fence_async_shared()
        zero = gl.full([BT, BT], 0.0, gl.float32, MMA)
        b_attn = warpgroup_mma(left, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        G_i = gl.expand_dims(s_G.load(gl.SliceLayout(1, MMA)), 1)
        G_j = gl.expand_dims(s_G.load(gl.SliceLayout(0, MMA)), 0)
        o_i = gl.expand_dims(gl.arange(0, BT, gl.SliceLayout(1, MMA)), 1) + opaque_zero()
        o_j = gl.expand_dims(gl.arange(0, BT, gl.SliceLayout(0, MMA)), 0)
        b_decay = gl.where(o_i >= o_j, exp2(G_i - G_j), 0.0)
        b_attn, left = warpgroup_mma_wait(0, [b_attn, left])
        b_A = warpgroup_mma(k, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        attn.index(mid).store((b_attn * b_decay).to(dtype))
        if PREPARES == 2:  # later than with one: c - 2 is being scanned when c is begun
            wait_done(done, c - 2, c >= 2, STAGES)
            copy_chunk(inputs, buffers, c + 2, n_tokens, STAGES, SCANS)
        b_A = warpgroup_mma_wait(0, [b_A])
        beta_i = gl.expand_dims(s_beta.load(gl.SliceLayout(1, MMA)), 1)
        b_A = b_A * b_decay * -beta_i
        scratch = solve.index(mid)._reinterpret(gl.float16, [BT, BT], SWIZZLED)
        b_X = unit_lower_inverse(b_A, o_i, o_j, scratch)
        beta_j = gl.expand_dims(s_beta.load(gl.SliceLayout(0, MMA)), 0)
        solve.index(mid).store((b_X * beta_j).to(dtype))
        fence_async_shared()
        mbarrier.arrive(ready.index(stage), count=1)
    async_copy.wait_group(0)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def state_offsets(INDEX: gl.constexpr, V: gl.constexpr):
    """Of state^T [BV, BK] in a state [K, V]. Computed anew where asked for: kept, they take as many registers."""
    o_v = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, WIDE_MMA)), 1)
    o_k = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(0, WIDE_MMA)), 0)
    return INDEX * BV + o_v + (o_k + opaque_zero()) * V


@gluon.jit
def scan(
    outs, INDEX: gl.constexpr, STAGES: gl.constexpr, MIDDLE: gl.constexpr, H: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """The V columns from INDEX * BV on of a tile. n_zero: how many rows of o are padding, zeroed instead."""
    p_state, p_o, buffers, middle, ready, done, n_tokens, n_zero, held = outs
    b_q, b_k, b_v = buffers
    solve, attn, decay_in, decay_out, keep = middle
    dtype: gl.constexpr = b_q.dtype
    o_t = gl.expand_dims(gl.arange(0, BT, gl.SliceLayout(1, ROWS)), 1)
    o_v = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, ROWS)), 0)
    p_o += INDEX * BV
    for i_t in range(0, n_zero, BT):
        p_rows = p_o + gl.cast(i_t, gl.int64) * (H * V) + o_t * (H * V) + o_v
        gl.store(p_rows, gl.full([BT, BV], 0.0, dtype, ROWS), mask=(i_t + o_t < n_zero) & (o_v >= 0))

    b_state = gl.full([BV, BK], 0.0, gl.float32, WIDE_MMA)  # state^T
    if held > 0:
        b_state = gl.load(p_state + state_offsets(INDEX, V)).to(gl.float32)
    s_state = gl.allocate_shared_memory(dtype, [BV, BK], SWIZZLED)
    zero = gl.full([BV, BT], 0.0, gl.float32, MMA)
    for c in range(0, gl.cdiv(n_tokens, BT)):
        stage, mid = c % STAGES, c % MIDDLE
        mbarrier.wait(ready.index(stage), (c // STAGES) & 1)
        v, k = b_v[INDEX].index(stage), b_k.index(stage)
        b_s = b_state.to(dtype)
        s_state.store(b_s)
        fence_async_shared()
        left = gl.convert_layout(b_s, WIDE_LEFT)
        b_kn_state = warpgroup_mma(left, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        b_kn_state, left = warpgroup_mma_wait(0, [b_kn_state, left])
        b_in = gl.expand_dims(decay_in.index(mid).load(gl.SliceLayout(0, MMA)), 0)
        kn_state = gl.convert_layout((b_kn_state * b_in).to(dtype), LEFT)
        b_vn = warpgroup_mma(kn_state, solve.index(mid).permute((1, 0)), zero, use_acc=False, is_async=True)
        b_vn = warpgroup_mma(v.permute((1, 0)), solve.index(mid).permute((1, 0)), b_vn, is_async=True)
        b_state *= gl.expand_dims(keep.index(mid).load(gl.SliceLayout(1, WIDE_MMA)), 1)
        b_vn, kn_state = warpgroup_mma_wait(0, [b_vn, kn_state])
        b_out = gl.expand_dims(decay_out.index(mid).load(gl.SliceLayout(0, MMA)), 0)
        out = gl.convert_layout((b_vn * b_out).to(dtype), LEFT)
        b_state = warpgroup_mma(out, k, b_state, is_async=True)
        new = gl.convert_layout(b_vn.to(dtype), LEFT)
        b_o = warpgroup_mma(new, attn.index(mid).permute((1, 0)), zero, use_acc=False, is_async=True)
        b_o = warpgroup_mma(s_state, b_q.index(stage).permute((1, 0)), b_o, is_async=True)
        b_state, b_o, out, new = warpgroup_mma_wait(0, [b_state, b_o, out, new])
        v.permute((1, 0)).store(b_o.to(dtype))  # o takes v's place, to leave by rows
        rows = v.load(ROWS)
        mbarrier.arrive(done.index(stage), count=1)
        o_row = o_t + opaque_zero()
        p_rows = p_o + gl.cast(c, gl.int64) * (BT * H * V) + o_row * (H * V) + o_v
        gl.store(p_rows, rows, mask=(c * BT + o_row < n_tokens) & (o_v >= 0))
    if n_tokens > 0:
        gl.store(p_state + state_offsets(INDEX, V), b_state.to(p_state.dtype.element_ty))


@gluon.jit(do_not_specialize=["T", "S", "stride_b", "stride_g"])  # a stride of 1 would be a constant
def hopper_delta_rule_kernel(
    q, k, v, beta, g, A_log, dt_bias, o, recurrent_state, cu_seqlens, slots, context_lens, T, S,
    stride_q, stride_k, stride_v, stride_b, stride_g, OFF_Q: gl.constexpr, OFF_K: gl.constexpr, OFF_V: gl.constexpr,
    OFF_G: gl.constexpr, H: gl.constexpr, HK: gl.constexpr, K: gl.constexpr, V: gl.constexpr, RAW: gl.constexpr,
    SILU: gl.constexpr, MIXED: gl.constexpr, PREPARES: gl.constexpr, SCANS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (V tiles, H, N)."""
    STAGES: gl.constexpr = PREPARES + 2  # chunks whose q, k and v are held
    MIDDLE: gl.constexpr = PREPARES + 1  # and solve, attn and decays
    dtype: gl.constexpr = q.dtype.element_ty
    i_v = gl.program_id(0) * (BV * SCANS)
    i_h = gl.program_id(1)
    i_n = gl.program_id(2)
    i_hk = i_h // (H // HK)
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    slot = slot_of(slots, i_n, S)
    held = gl.load(context_lens + i_n)
    n_tokens = eos - bos
    if MIXED:
        n_tokens = gl.where(n_tokens == 1, 0, n_tokens)
    n_zero = gl.where(slot < 0, n_tokens, 0)
    n_tokens = gl.where(slot < 0, 0, n_tokens)
    slot = gl.maximum(slot, 0)
    row = bos.to(gl.int64)

    b_q = gl.allocate_shared_memory(dtype, [STAGES, BT, BK], SWIZZLED)
    b_k = gl.allocate_shared_memory(dtype, [STAGES, BT, BK], SWIZZLED)
    b_v = gl.allocate_shared_memory(dtype, [STAGES, BT, BV], SWIZZLED)
    b_v_more = b_v
    if SCANS == 2:
        b_v_more = gl.allocate_shared_memory(dtype, [STAGES, BT, BV], SWIZZLED)
    solve = gl.allocate_shared_memory(dtype, [MIDDLE, BT, BT], SWIZZLED)
    attn = gl.allocate_shared_memory(dtype, [MIDDLE, BT, BT], SWIZZLED)
    decay_in = gl.allocate_shared_memory(gl.float32, [MIDDLE, BT], PLAIN)
    decay_out = gl.allocate_shared_memory(gl.float32, [MIDDLE, BT], PLAIN)
    keep = gl.allocate_shared_memory(gl.float32, [MIDDLE, 1], PLAIN)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(done.index(i), count=SCANS)

    inputs = (
        q + row * stride_q + OFF_Q + i_hk * K, k + row * stride_k + OFF_K + i_hk * K,
        v + row * stride_v + OFF_V + i_h * V + i_v, stride_q, stride_k, stride_v,
    )  # fmt: skip
    gates = (beta + row * stride_b + i_h, g + row * stride_g + OFF_G + i_h, stride_b, stride_g, A_log, dt_bias, i_h)
    p_state = recurrent_state + (slot * H + i_h) * (K * V) + i_v
    p_o = o + row * (H * V) + i_h * V + i_v
    buffers, middle = (b_q, b_k, (b_v, b_v_more)), (solve, attn, decay_in, decay_out, keep)
    ins = (inputs, gates, buffers, middle, ready, done, n_tokens)
    outs = (p_state, p_o, buffers, middle, ready, done, n_tokens, n_zero, held)
    gl.static_assert(SCANS + PREPARES == 3)
    if SCANS == 2:
        gl.warp_specialize(
            [
                (scan, (outs, 0, STAGES, MIDDLE, H, V)),
                (scan, (outs, 1, STAGES, MIDDLE, H, V)),
                (prepare, (ins, 0, PREPARES, SCANS, STAGES, MIDDLE, RAW, SILU)),
            ],
            [4, 4], [REGISTERS, 504 - 2 * REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (scan, (outs, 0, STAGES, MIDDLE, H, V)),
                (prepare, (ins, 0, PREPARES, SCANS, STAGES, MIDDLE, RAW, SILU)),
                (prepare, (ins, 1, PREPARES, SCANS, STAGES, MIDDLE, RAW, SILU)),
            ],
            [4, 4], [REGISTERS, REGISTERS],
        )  # fmt: skip
