"""Gated delta rule: linear attention in which every token corrects the state instead of only adding to it.

Per head, with qn = q / |q| * K^-0.5 and kn = k / |k| (|x| = sqrt(sum(x^2) + 1e-6)) and state [K, V] in fp32:

    state = exp(g) state;   delta = beta (v - state^T kn);   state = state + kn delta^T;   o = state^T qn

q, k [T, HK, K]; v, o [T, H, V]; beta [T, H] in (0, 1); g [T, H] fp32, natural-log decay (<= 0). HK is H, or a divisor:
then every query and key head serves H / HK consecutive value heads, which have a state each.
The chunk form processes `chunk_size` tokens at once. With G_i the sum of g up to token i of the chunk:

    A_ij = beta_i (kn_i . kn_j) exp(G_i - G_j)   (j < i);      [u | w] = (I + A)^-1 [beta v | beta exp(G) kn]
    v_new = u - w state;    o = exp(G) qn state + tril((qn kn^T) exp(G_i - G_j)) v_new
    state = exp(G_last) state + sum_i exp(G_last - G_i) kn_i v_new_i^T

The kernels are in gated_delta_rule_chunk.py (prefill), gated_delta_rule_decode.py, and gated_delta_rule_deferred.py for
states that are written every few tokens.
Source: Gated Delta Networks, arXiv 2412.06464, section 3 (the WY form of arXiv 2406.06484 with decay).
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.kernels.common import acc_dtype, by_rows, rows, zero_padding
from jet_export.kernels.form import Form
from jet_export.kernels.gated_delta_rule_chunk import chunk_delta_rule_triton
from jet_export.kernels.gated_delta_rule_decode import decode_delta_rule_triton
from jet_export.kernels.gated_delta_rule_deferred import deferred_delta_rule_triton
from jet_export.kernels.step_buffer import (
    current_state,
    flush_triton,
    held_buffer,
    keep_tokens_ref,
    write_state_ref,
)
from jet_export.kernels.triton_op import triton_op

L2_EPS = 1e-6
CHUNK_SIZE = 64
STATES = {"recurrent_state", "step_buffer", "state_position"}  # updated in place


def l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def per_value_head(x: Tensor, num_heads: int) -> Tensor:  # [..., HK, K] -> [..., H, K]
    """The query or key that each value head uses."""
    return x if x.shape[-2] == num_heads else x.repeat_interleave(num_heads // x.shape[-2], -2)


def gated_delta_rule_ref(
    q: Tensor,  # [B, T, HK, K]
    k: Tensor,  # [B, T, HK, K]
    v: Tensor,  # [B, T, H, V]
    beta: Tensor,  # [B, T, H]
    g: Tensor,  # [B, T, H]
    initial_state: Tensor | None = None,  # [B, H, K, V]
) -> tuple[Tensor, Tensor]:  # o [B, T, H, V], final_state [B, H, K, V]
    """The specification: token by token, in fp32 (fp64 for fp64 inputs). Both results have that dtype."""
    o, state, _ = delta_rule_steps_ref(q, k, v, beta, g, initial_state)
    return o, state


def delta_rule_steps_ref(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gated_delta_rule_ref`, and each token's kn | delta | g [B, T, H, K + V + 1]."""
    (B, T, _, K), H = q.shape, v.shape[2]
    acc = acc_dtype(q.dtype)
    q, k = per_value_head(q, H), per_value_head(k, H)
    q, k, v, beta, decay = (
        l2norm(q.to(acc)) * K**-0.5,
        l2norm(k.to(acc)),
        v.to(acc),
        beta.to(acc),
        by_rows(torch.exp, g.to(acc)),
    )
    state = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(acc)
    o, deltas = [], []
    for t in range(T):
        state = state * decay[:, t, :, None, None]
        delta = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, :, :, None]).sum(-2))
        state = state + k[:, t, :, :, None] * delta[:, :, None, :]
        o.append((state * q[:, t, :, :, None]).sum(-2))  # not einsum, whose sums depend on the number of rows
        deltas.append(delta)
    return torch.stack(o, 1), state, torch.cat([k, torch.stack(deltas, 1), g.to(acc)[..., None]], -1)


def chunk_gated_delta_rule_ref(
    q: Tensor,  # [B, T, HK, K]
    k: Tensor,  # [B, T, HK, K]
    v: Tensor,  # [B, T, H, V]
    beta: Tensor,  # [B, T, H]
    g: Tensor,  # [B, T, H]
    initial_state: Tensor | None = None,  # [B, H, K, V]
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:  # o [B, T, H, V], final_state [B, H, K, V]
    """The chunk form in plain torch, differentiable; dtypes as `gated_delta_rule_ref`."""
    (B, T, _, K), (H, V) = q.shape, v.shape[2:]
    C, acc = min(chunk_size, T), acc_dtype(q.dtype)
    q, k = per_value_head(q, H), per_value_head(k, H)

    def chunks(x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [B, H, T/C, C, ...]; padded with zeros: beta = 0 and g = 0 leave the state as it is."""
        x = F.pad(x.to(acc), [0, 0] * (x.dim() - 2) + [0, -T % C])
        return x.unflatten(1, (-1, C)).movedim(3, 1)

    q, k, v, beta, G = chunks(q), chunks(k), chunks(v), chunks(beta), chunks(g).cumsum(-1)
    q, k = l2norm(q) * K**-0.5, l2norm(k)
    below = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    # exp(G_i - G_j) only where i >= j: exp(-G_j) alone overflows
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(~below, float("-inf")).exp()
    A = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    rhs = beta[..., None] * torch.cat([v, G.exp()[..., None] * k], -1)
    u, w = torch.linalg.solve_triangular(A, rhs, upper=False, unitriangular=True).split([V, K], -1)
    attn = (q @ k.mT) * decay
    q_in = q * G.exp()[..., None]
    k_out = k * (G[..., -1:] - G).exp()[..., None]
    keep = G[..., -1].exp()

    state = q.new_zeros(B, H, K, V) if initial_state is None else initial_state.to(acc)
    o = []
    for c in range(q.shape[2]):
        v_new = u[:, :, c] - w[:, :, c] @ state
        o.append(q_in[:, :, c] @ state + attn[:, :, c] @ v_new)
        state = keep[:, :, c, None, None] * state + k_out[:, :, c].mT @ v_new
    return torch.stack(o, 2).movedim(1, 3).flatten(1, 2)[:, :T], state


def packed_gated_delta_rule_ref(
    q: Tensor,  # [T, HK, K]
    k: Tensor,  # [T, HK, K]
    v: Tensor,  # [T, H, V]
    beta: Tensor,  # [T, H]
    g: Tensor,  # [T, H]
    recurrent_state: Tensor,  # [S, H, K, V], updated in place
    cu_seqlens: Tensor,  # [N+1]
    slots: Tensor,  # [N]
    context_lens: Tensor,  # [N]
    form: int,
    step_buffer: Tensor | None = None,  # [S, H, rows, K + V + 4], updated in place (step_buffer.py)
    state_position: Tensor | None = None,  # [S, H], updated in place
    interval: int = 1,
) -> Tensor:  # [T, H, V] in fp32 (fp64)
    """Packed sequences by `form.Form`: steps of one token are one batch, chunks run sequence by sequence."""
    H, V = v.shape[1:]
    pools = recurrent_state, step_buffer, state_position
    initial = current_state(*pools, slots, context_lens, q.dtype)
    o = initial.new_zeros(q.shape[0], H, V)
    bounds = cu_seqlens.tolist()
    lens = [b - a for a, b in itertools.pairwise(bounds)]
    if form == Form.DECODE and max(lens) > 1:
        raise ValueError("a call of the form DECODE has one token a sequence")
    held_buffer(step_buffer, state_position, interval, form)
    steps = [n for n, size in enumerate(lens) if size == 1 and form != Form.PREFILL]
    if step_buffer is not None and state_position is not None and form == Form.VERIFY:
        steps = []
    if steps:
        t = torch.tensor([bounds[n] for n in steps])
        q_n, k_n, v_n, beta_n, g_n = (x[t][:, None] for x in (q, k, v, beta, g))
        o_steps, final, token = delta_rule_steps_ref(q_n, k_n, v_n, beta_n, g_n, initial[steps])
        o[t] = o_steps[:, 0]
        some = slots[steps], context_lens[steps]
        if step_buffer is None or state_position is None:
            write_state_ref(final, recurrent_state, None, *some)
        else:
            keep_tokens_ref(token, initial[steps], recurrent_state, step_buffer, state_position, *some, interval)
    for n in sorted(set(range(len(lens))) - set(steps)):
        tokens = slice(bounds[n], bounds[n + 1])
        # Cloned: the bits of a matrix product may depend on its operands' alignment.
        q_n, k_n, v_n, beta_n, g_n = (x[None, tokens].clone() for x in (q, k, v, beta, g))
        args = q_n, k_n, v_n, beta_n, g_n, initial[n : n + 1]
        one = slots[n : n + 1], context_lens[n : n + 1]
        if step_buffer is not None and state_position is not None and form == Form.VERIFY:
            o_n, _, appended = delta_rule_steps_ref(*args)
            before = initial[n : n + 1]
            keep_tokens_ref(appended, before, recurrent_state, step_buffer, state_position, *one, interval)
        else:
            o_n, final = chunk_gated_delta_rule_ref(*args)
            write_state_ref(final, recurrent_state, state_position, one[0], one[1] + lens[n])
        o[tokens] = o_n[0]
    return zero_padding(o, cu_seqlens, slots)


def gated_delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    form: int,
    step_buffer: Tensor | None = None,
    state_position: Tensor | None = None,
    interval: int = 1,
) -> Tensor:
    """Launches the kernels; arguments as `packed_gated_delta_rule_ref`."""
    q, k, v, beta, g = (rows(x) for x in (q, k, v, beta, g))
    head_dims, key_heads = (v.shape[1], q.shape[2], v.shape[2]), q.shape[1]
    inputs = q, k, v, beta, g, recurrent_state, cu_seqlens, slots, context_lens, head_dims
    form = Form(int(form))  # may be symbolic in a dynamic torch.compile
    buffer = held_buffer(step_buffer, state_position, interval, form)
    if form in (Form.DECODE, Form.VERIFY):
        if buffer is None:
            return decode_delta_rule_triton(*inputs, key_heads=key_heads)
        return deferred_delta_rule_triton(*inputs, buffer, form is Form.VERIFY, key_heads=key_heads)
    mixed = form is Form.MIXED
    if buffer is not None:
        flush_triton(recurrent_state, *buffer[:2], cu_seqlens, slots, context_lens, q.shape[0], mixed)
    o = chunk_delta_rule_triton(*inputs, mixed=mixed, key_heads=key_heads)
    if mixed:
        if buffer is None:
            return decode_delta_rule_triton(*inputs, out=o, key_heads=key_heads)
        return deferred_delta_rule_triton(*inputs, buffer, out=o, key_heads=key_heads)
    return o


@torch.library.custom_op("jet::gated_delta_rule_cpu", mutates_args=STATES)
def gated_delta_rule_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    form: int,
    step_buffer: Tensor | None,
    state_position: Tensor | None,
    interval: int,
) -> Tensor:
    tail = cu_seqlens, slots, context_lens, form, step_buffer, state_position, interval
    o = packed_gated_delta_rule_ref(q, k, v, beta, g, recurrent_state, *tail)
    return o.to(v.dtype).contiguous()


@gated_delta_rule_cpu.register_fake
def _(
    q, k, v, beta, g, recurrent_state, cu_seqlens, slots, context_lens, form,
    step_buffer, state_position, interval,
):  # fmt: skip
    return v.new_empty(v.shape)


@triton_op("jet::gated_delta_rule", mutates_args=STATES)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    form: int,
    step_buffer: Tensor | None,
    state_position: Tensor | None,
    interval: int,
) -> Tensor:
    """o [T, H, V] in v's dtype; recurrent_state is updated in place. See the module's equations."""
    tail = cu_seqlens, slots, context_lens, form, step_buffer, state_position, interval
    if q.device.type == "cpu":
        return torch.ops.jet.gated_delta_rule_cpu(q, k, v, beta, g, recurrent_state, *tail)
    return gated_delta_rule_triton(q, k, v, beta, g, recurrent_state, *tail)
