"""Prefill of the gated delta rule on SM 9.0 by one warp-specialised kernel; equations in gated_delta_rule.py.

No op uses it yet.

What the portable form (gated_delta_rule_chunk.py) stores between its two kernels stays in the multiprocessor here: kn,
q_in = exp(G) qn, solve = (I + A)^-1 diag(beta) and attn = tril((qn kn^T) exp(G_i - G_j)). A program is a (sequence,
value head, V tile). Its three warpgroups divide the chunks of 64 tokens:

- PREPARES of them copy q, k and v to shared memory a chunk ahead (zeros beyond the end of the sequence), normalise q
  and k in place, and leave solve, attn and the decays beside them: everything that needs no state.
- SCANS of them step through the chunks, each with the state^T [64, K] of 64 columns of V in registers:

    v_new = solve (v - exp(G) kn state);    o = q_in state + attn v_new
    state = exp(G_last) state + (exp(G_last - G) kn)^T v_new

Wide programs have two scans and one preparer, narrow ones the reverse: for batches of few heads, whose programs all run
at once and whose time is that of one chain of chunks.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from jet_export.utils.errors import JetExportError

BV = 64  # columns of V a scan
# REGISTERS: of each warpgroup of the kind that a program has two of; the third has the rest of 504.
WIDE = {"PREPARES": 1, "SCANS": 2, "REGISTERS": 160}
NARROW = {"PREPARES": 2, "SCANS": 1, "REGISTERS": 168}


def form_for(programs: int, head_v_dim: int, multiprocessors: int) -> dict[str, int]:
    """WIDE or NARROW for a batch of `programs` heads, of all its sequences together."""
    return NARROW if head_v_dim % (2 * BV) or programs * (head_v_dim // BV) <= multiprocessors else WIDE


def refusal(q: Tensor, k: Tensor, v: Tensor, K: int, V: int, offsets: tuple[int, int, int, int]) -> str:
    """Why the kernel cannot serve these inputs; empty: it can."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, not bfloat16 or float16"
    if K != 128 or V % BV:
        return f"K {K} and V {V}: it has K 128 and V a multiple of {BV}"
    for name, x, offset in zip("qkv", (q, k, v), offsets, strict=False):
        if x.stride(0) % 16 or offset % 16 or x.data_ptr() % 32:
            return f"the rows of {name} are not aligned to 32 bytes"
    return ""


def kernel_for(q: Tensor, k: Tensor, v: Tensor, K: int, V: int, offsets: tuple[int, int, int, int]) -> Any:
    """The kernel, if it can serve these inputs. Raises JetExportError."""
    why = refusal(q, k, v, K, V, offsets)
    try:
        from jet_export.kernels.hopper_gated_delta_rule_kernel import hopper_delta_rule_kernel as kernel
    except ImportError as missing:
        why = f"Triton {triton.__version__} has no Gluon for Hopper, which 3.6 has ({missing})"
    if not why and (not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0)):
        why = "it is for a GPU of SM 9.0"
    if not why:
        return kernel
    raise JetExportError(f"hopper_delta_rule: {why}. Use chunk_delta_rule_triton.")


def hopper_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    head_dims: tuple[int, int, int],
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
    raw_gates: tuple[Tensor, Tensor] | None = None,
    mixed: bool = False,
    key_heads: int = 0,
    silu: bool = False,
    form: dict[str, int] | None = None,
) -> Tensor:
    """As gated_delta_rule_chunk.chunk_delta_rule_triton, for K 128; `form`: WIDE or NARROW, chosen if not given.

    Raises JetExportError for sizes, dtypes and strides that it does not serve, another GPU, or a Triton without Gluon.
    """
    H, K, V = head_dims
    kernel = kernel_for(q, k, v, K, V, offsets)
    N, off_q, off_k, off_v, off_g = slots.shape[0], *offsets
    if form is None:
        form = form_for(N * H, V, torch.cuda.get_device_properties(q.device).multi_processor_count)
    A_log, dt_bias = raw_gates or (g, g)
    o = q.new_empty(q.shape[0], H, V)
    kernel[(V // (BV * form["SCANS"]), H, N)](
        q, k, v, beta, g, A_log, dt_bias, o, recurrent_state, cu_seqlens, slots, context_lens,
        q.shape[0], recurrent_state.shape[0], q.stride(0), k.stride(0), v.stride(0), beta.stride(0), g.stride(0),
        OFF_Q=off_q, OFF_K=off_k, OFF_V=off_v, OFF_G=off_g, H=H, HK=key_heads or H, K=K, V=V,
        RAW=raw_gates is not None, SILU=silu, MIXED=mixed, num_warps=4, **form,
    )  # fmt: skip
    return o
