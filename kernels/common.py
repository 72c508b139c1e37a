"""What the kernels share: the packed-token contract on the host, and small jit functions for the device.

Packed tokens: x is [T, ...] for N sequences, `cu_seqlens` [N+1] int32 their bounds, `slots` [N] int32 their rows in
the state pools (< 0: a padding row - nothing read, nothing written, output zero), `context_lens` [N] int32 the tokens
already held (0: start from zero state, whatever the pool holds). Every sequence has at least one token.
A call states what its sequences are, its `Form` (form.py); nothing is guessed from sizes. An engine builder may time a
kernel on arbitrary inputs: whatever these tensors and a block table hold, no kernel accesses memory outside its tensors
or loops without bound. The results for invalid inputs are undefined.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRETED: tl.constexpr = tl.constexpr(INTERPRET)  # for kernels


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


def by_rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise f of x [..., n], so that a row's bits depend neither on its position nor on the number of rows.

    On a CPU torch evaluates exp of a tensor's last elements, and of strided ones, by another function than that of the
    others; rows padded to whole vectors have no such remainder.
    """
    n = x.shape[-1]
    return f(F.pad(x, (0, -n % 64)).contiguous())[..., :n]


_dependent_launch = False


@contextmanager
def dependent_launch(wanted: bool) -> Iterator[None]:
    """Inside, kernels are compiled for programmatic dependent launch: see `await_inputs`. SM 9.0 and later."""
    global _dependent_launch
    before, _dependent_launch = _dependent_launch, wanted
    try:
        yield
    finally:
        _dependent_launch = before


def gdc() -> bool:
    """The GDC of a kernel that has `await_inputs`."""
    return _dependent_launch and not INTERPRET


AHEAD_BYTES = 2**24  # of a tensor that is asked for ahead, at most: a third of an H100's L2


def ahead_of(weights: Sequence[Tensor], like: Tensor) -> dict[str, Any]:
    """The arguments of a kernel that asks L2 for up to two weights ahead (`ask_ahead`), where graphs overlap launches;
    `like` stands for those that are not there."""
    assert len(weights) <= 2
    asked = [w for w in weights if gdc()]
    sizes = [min(w.numel() * w.element_size(), AHEAD_BYTES) // 128 * 128 for w in asked]
    first, second = [*asked, like, like][:2]
    return dict(zip(("ahead", "ahead_more", "AHEAD", "AHEAD_MORE"), (first, second, *[*sizes, 0, 0][:2]), strict=True))


def wrap(kernel: Any) -> Any:
    """The kernel as the body of a triton_op launches it. The interpreter's functions cannot and need not be traced."""
    return kernel if INTERPRET else torch.library.wrap_triton(kernel)


def rows(x: Tensor) -> Tensor:
    """x [T, ...] with contiguous rows and any stride between them; copied only where it must be."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def dot_precision(dtype: torch.dtype) -> str:
    """IEEE products for fp32 inputs. For 16-bit inputs this affects only products of fp32 intermediates."""
    return "ieee" if dtype == torch.float32 else "tf32"


def num_chunks(num_tokens: int, num_sequences: int, chunk_size: int) -> int:
    """The host's bound on the chunks of ragged sequences: sequence n owns ids from cu_seqlens[n] // BT + n on."""
    return num_tokens // chunk_size + num_sequences


@triton.jit
def await_inputs(GDC: tl.constexpr):
    """0, to be added to what every address of data that earlier kernels of a step write is computed from.

    Launched by a programmatic edge of a CUDA graph (runtime/launch_edges.py) a kernel starts while the one before it
    ends, and waits here until that has ended; weights may be read before. Every program must come by, those that have
    nothing to do too: only then has a kernel that has ended waited for all before it. Launched otherwise, this does
    nothing. The order is one of data, since torch takes a kernel with an instruction of side effects to write to every
    argument."""
    zero = 0
    if GDC:
        zero = tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    return zero


@triton.jit
def ask_for(p, nbytes):
    """0. L2 is asked for nbytes from p on, both multiples of 16, by one thread. SM 9.0."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred one;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 one, thread, 0;
        setp.gt.and.s32 one, $2, 0, one;
        @one cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""", "=r,l,r",
        [p.to(tl.int64), tl.zeros([], tl.int32) + nbytes], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def ask_share(p, i, n, NBYTES: tl.constexpr):
    """0. Program i of n asks L2 for its share of NBYTES from p on."""
    zero = 0
    if NBYTES > 0:
        share = (NBYTES // 128 + n - 1) // n * 128
        zero = ask_for(p.to(tl.int64) + i * share, tl.minimum(share, NBYTES - i * share))
    return zero


@triton.jit
def ask_ahead(first, second, i, n, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """0. Program i of n asks L2 for its shares of FIRST bytes from `first` on and of SECOND from `second` on: weights
    that kernels behind this one read, so that memory is busy while a step's kernels wait for each other."""
    return ask_share(first, i, n, FIRST) + ask_share(second, i, n, SECOND)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def sequence_bounds(cu_seqlens, i_n, T):
    """A sequence's first and end token, inside the T packed ones whatever cu_seqlens holds."""
    bos = clamp(tl.load(cu_seqlens + i_n), 0, T)
    return bos, clamp(tl.load(cu_seqlens + i_n + 1), bos, T)


@triton.jit
def longer_sequences(cu_seqlens, N):
    """How many of the N sequences have more than one token."""
    o_n = tl.arange(0, 128)
    count = 0
    for i in range(0, N, 128):
        m_n = i + o_n < N
        b_bos = tl.load(cu_seqlens + i + o_n, mask=m_n, other=0)
        b_eos = tl.load(cu_seqlens + i + o_n + 1, mask=m_n, other=0)
        count += tl.sum((b_eos - b_bos > 1).to(tl.int32), 0)
    return count


@triton.jit
def slot_of(slots, i_n, S):
    """A sequence's row in pools of S rows, int64; -1 for padding, and for a row that no pool has."""
    slot = tl.load(slots + i_n)
    return tl.where(slot < S, slot, -1).to(tl.int64)


@triton.jit
def find_chunk(cu_seqlens, i_chunk, N, T, BT: tl.constexpr):
    """Sequence that owns a chunk id, first and end token of the sequence, first token of the chunk.

    The chunk may lie outside the sequence: then no sequence owns it, and its program returns."""
    lo = tl.full([], 0, tl.int32)
    hi = tl.full([], -1, tl.int32) + N
    while lo < hi:  # the largest n with cu_seqlens[n] // BT + n <= i_chunk
        mid = (lo + hi + 1) // 2
        below = tl.load(cu_seqlens + mid) // BT + mid <= i_chunk
        lo = tl.where(below, mid, lo)
        hi = tl.where(below, hi, mid - 1)
    bos, eos = sequence_bounds(cu_seqlens, lo, T)
    return lo, bos, eos, bos + (i_chunk - bos // BT - lo) * BT


@triton.jit
def fp32(scalar):
    """A float argument as Triton's own launcher types it; Inductor passes Python floats as fp64."""
    return tl.cast(scalar, tl.float32)


@triton.jit
def i64(scalar):
    """An integer argument, widened; to torch 2.11, looking for what a kernel writes, it is a Python int."""
    return tl.cast(scalar, tl.int64)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), linear above 20 as torch has it."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    # log1p: the factor e / (u - 1) undoes the rounding of 1 + e
    return tl.where(x > 20.0, x, tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0))))
