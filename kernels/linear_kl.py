"""Distillation loss of two linear layers over a large vocabulary, chunk by chunk, with its gradients.

With z = x w^T, z' = x' w'^T the logits of student and teacher, s the temperature, over the tokens with a label:

    kl = s^2 mean sum_v p' (ln p' - ln p),  p = softmax(z / s), p' = softmax(z' / s);   ce = mean -ln softmax(z)[label]
    loss = kl_weight kl + ce_weight ce;   dz = (kl_weight s (p - p') + ce_weight (softmax(z) - onehot)) / tokens

s^2 keeps the size of the gradient at every temperature (arXiv 1503.02531). Only the logits of `chunk` tokens exist at a
time, in the model dtype; dz replaces them, and dx = dz w and dw += dz^T x (fp32) follow at once, so that the backward
pass only scales (the scheme of arXiv 2410.10989). Beside its results the op holds 2 chunk V elements, and V d in fp32
if w has a gradient. The teacher has none. A chunk is 1,024 tokens of 152K logits, and more tokens of a smaller
vocabulary: their chunks would be launches with little work.

On a GPU `kl_rows_kernel` reads a row's logits twice, first for the sums, by an online softmax (arXiv 1805.02867) in
every lane, then for dz:  kl = s^2 (sum_v p' (z' - z) / s - ln sum exp(z' / s) + ln sum exp(z / s)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import acc_dtype, fp32
from jet_export.kernels.gated_delta_rule_torch import in_plain_torch
from jet_export.utils.errors import JetExportError

IGNORED = -100
LOGITS = 1024 * 152_064  # in a chunk, by default


def kl_rows_torch(
    z: Tensor,  # [C, V]
    z_teacher: Tensor,  # [C, V]
    labels: Tensor,  # [C] int64
    scales: Tensor,  # [2]: kl_weight / tokens, ce_weight / tokens
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # kl [C], ce [C] (0 where ignored), dz [C, V]
    """The specification of a chunk, in fp32 (fp64 for fp64 logits); kl has the factor temperature^2."""
    acc = acc_dtype(z.dtype)
    z, z_teacher = z.to(acc), z_teacher.to(acc)
    counts = labels != IGNORED
    logp = (z / temperature).log_softmax(-1)
    logp_teacher = (z_teacher / temperature).log_softmax(-1)
    p_teacher = logp_teacher.exp()
    plain = logp if temperature == 1 else z.log_softmax(-1)
    at = labels.clamp(min=0)[:, None]
    kl = temperature**2 * (p_teacher * (logp_teacher - logp)).sum(-1)
    ce = -plain.gather(1, at)[:, 0]
    dz = (logp.exp() - p_teacher) * (scales[0] * temperature)
    dz += (plain.exp().scatter_add(1, at, -torch.ones_like(at, dtype=acc))) * scales[1]
    zero = torch.zeros((), dtype=acc, device=z.device)
    return torch.where(counts, kl, zero), torch.where(counts, ce, zero), torch.where(counts[:, None], dz, zero)


@triton.jit
def kl_rows_kernel(
    z, z_teacher, labels, scales, kl, ce, stride_z, stride_teacher, temperature,
    V: tl.constexpr, BV: tl.constexpr, TEMPERED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Grid (C). With GRADIENT dz overwrites z. scales: kl_weight / tokens and ce_weight / tokens. A label that is no
    token gives NaN."""
    i_c = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + i_c)
    p_z, p_t = z + i_c * stride_z, z_teacher + i_c * stride_teacher
    o_lane = tl.arange(0, BV)
    if label == -100:
        tl.store(kl + i_c, 0.0)
        tl.store(ce + i_c, 0.0)
        if GRADIENT:
            for i in range(0, V, BV):
                tl.store(p_z + i + o_lane, tl.zeros([BV], z.dtype.element_ty), mask=i + o_lane < V)
        return
    s = fp32(temperature)
    rate = 1.0 / s
    LOWEST: tl.constexpr = -3.4028234663852886e38  # finite: a lane without logits counts exp(LOWEST - top) = 0
    b_max = tl.full([BV], LOWEST, tl.float32)  # of z
    b_max_t = tl.full([BV], LOWEST, tl.float32)  # of z'
    b_sum = tl.zeros([BV], tl.float32)  # of exp((z - max) * rate)
    b_plain = tl.zeros([BV], tl.float32)  # of exp(z - max)
    b_sum_t = tl.zeros([BV], tl.float32)  # of exp((z' - max') * rate)
    b_cross = tl.zeros([BV], tl.float32)  # of exp((z' - max') * rate) (z' - z)
    for i in tl.range(0, V, BV, num_stages=2):
        m = i + o_lane < V
        b_z = tl.load(p_z + i + o_lane, mask=m, other=LOWEST).to(tl.float32)
        b_t = tl.load(p_t + i + o_lane, mask=m, other=LOWEST).to(tl.float32)
        b_new, b_new_t = tl.maximum(b_max, b_z), tl.maximum(b_max_t, b_t)
        b_sum = b_sum * tl.exp((b_max - b_new) * rate) + tl.exp((b_z - b_new) * rate)
        if TEMPERED:
            b_plain = b_plain * tl.exp(b_max - b_new) + tl.exp(b_z - b_new)
        b_scale, b_e = tl.exp((b_max_t - b_new_t) * rate), tl.exp((b_t - b_new_t) * rate)
        b_sum_t = b_sum_t * b_scale + b_e
        b_cross = b_cross * b_scale + tl.where(m, b_e * (b_t - b_z), 0.0)
        b_max, b_max_t = b_new, b_new_t
    top, top_t = tl.max(b_max, 0), tl.max(b_max_t, 0)
    lse = tl.log(tl.sum(b_sum * tl.exp((b_max - top) * rate), 0)) + top * rate
    plain = lse
    if TEMPERED:
        plain = tl.log(tl.sum(b_plain * tl.exp(b_max - top), 0)) + top
    b_scale = tl.exp((b_max_t - top_t) * rate)
    sum_t = tl.sum(b_sum_t * b_scale, 0)
    lse_t = tl.log(sum_t) + top_t * rate
    at_label = tl.load(p_z + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    tl.store(kl + i_c, s * s * (tl.sum(b_cross * b_scale, 0) * rate / sum_t - lse_t + lse))
    tl.store(ce + i_c, plain - at_label)
    if GRADIENT:
        kl_scale, ce_scale = tl.load(scales) * s, tl.load(scales + 1)
        tl.debug_barrier()  # every thread has read z[label]
        for i in tl.range(0, V, BV, num_stages=2):
            m = i + o_lane < V
            b_z = tl.load(p_z + i + o_lane, mask=m, other=0.0).to(tl.float32)
            b_t = tl.load(p_t + i + o_lane, mask=m, other=0.0).to(tl.float32)
            b_p = tl.exp(b_z * rate - lse)
            b_dz = kl_scale * (b_p - tl.exp(b_t * rate - lse_t))
            if TEMPERED:
                b_p = tl.exp(b_z - plain)
            b_dz += ce_scale * (b_p - tl.where(i + o_lane == label, 1.0, 0.0))
            tl.store(p_z + i + o_lane, b_dz.to(z.dtype.element_ty), mask=m)


def kl_rows_triton(
    z: Tensor,  # [C, V], rows contiguous; overwritten by dz with `gradient`
    z_teacher: Tensor,  # [C, V], rows contiguous
    labels: Tensor,  # [C] int64
    scales: Tensor,  # [2] fp32
    temperature: float,
    gradient: bool,
    block: int = 2048,
) -> tuple[Tensor, Tensor]:  # kl [C], ce [C] fp32
    """Launches the kernel."""
    C, V = z.shape
    kl, ce = (z.new_empty(C, dtype=torch.float32) for _ in range(2))
    kl_rows_kernel[(C,)](
        z, z_teacher, labels, scales, kl, ce, z.stride(0), z_teacher.stride(0), float(temperature),
        V=V, BV=min(block, triton.next_power_of_2(V)), TEMPERED=temperature != 1, GRADIENT=gradient, num_warps=8,
    )  # fmt: skip
    return kl, ce


@torch.library.custom_op("jet::linear_kl", mutates_args=())
def linear_kl_op(
    x: Tensor,
    w: Tensor,
    x_teacher: Tensor,
    w_teacher: Tensor,
    labels: Tensor,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    chunk: int,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """kl, ce, loss (fp32, []), dx, dw (empty where not needed) of a loss gradient of 1."""
    acc = acc_dtype(x.dtype)
    tokens = (labels != IGNORED).sum().clamp(min=1).to(acc)
    scales = torch.stack([kl_weight / tokens, ce_weight / tokens])
    kl, ce = x.new_zeros((), dtype=acc), x.new_zeros((), dtype=acc)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)
    dw = torch.zeros_like(w, dtype=acc) if needs_dw else w.new_empty(0)
    for i in range(0, x.shape[0], chunk):
        rows = slice(i, i + chunk)
        z, z_teacher = x[rows] @ w.t(), x_teacher[rows] @ w_teacher.t()
        if in_plain_torch(x):
            kl_i, ce_i, dz = kl_rows_torch(z, z_teacher, labels[rows], scales, temperature)
            dz = dz.to(x.dtype)
        else:
            kl_i, ce_i = kl_rows_triton(z, z_teacher, labels[rows], scales, temperature, needs_dx or needs_dw)
            dz = z
        kl, ce = kl + kl_i.sum(), ce + ce_i.sum()
        if needs_dx:
            torch.mm(dz, w, out=dx[rows])
        if needs_dw:
            dw += dz.t() @ x[rows]
    kl, ce = kl / tokens, ce / tokens
    return kl, ce, kl_weight * kl + ce_weight * ce, dx, dw.to(w.dtype)


@linear_kl_op.register_fake
def _(x, w, x_teacher, w_teacher, labels, kl_weight, ce_weight, temperature, chunk, needs_dx, needs_dw):
    kl, ce, loss = (x.new_empty((), dtype=acc_dtype(x.dtype)) for _ in range(3))
    return kl, ce, loss, x.new_empty(x.shape if needs_dx else 0), w.new_empty(w.shape if needs_dw else 0)


def _save(ctx, inputs, output):
    ctx.needs = inputs[-2:]
    ctx.save_for_backward(*output[3:])


def _backward(ctx, d_kl, d_ce, d_loss, *_):
    dx, dw = ctx.saved_tensors
    needs_dx, needs_dw = ctx.needs
    gradients = dx * d_loss.to(dx.dtype) if needs_dx else None, dw * d_loss.to(dw.dtype) if needs_dw else None
    return *gradients, *[None] * 9


linear_kl_op.register_autograd(_backward, setup_context=_save)


def linear_kl(
    x: Tensor,  # [T, d]
    w: Tensor,  # [V, d]
    x_teacher: Tensor,  # [T, d']
    w_teacher: Tensor,  # [V, d']
    labels: Tensor,  # [T] int64; -100: the token does not count, neither for kl nor for ce
    *,
    kl_weight: float,
    ce_weight: float,
    temperature: float = 1.0,
    chunk: int | None = None,  # tokens whose logits exist at a time; default: those of LOGITS
) -> tuple[Tensor, Tensor, Tensor]:  # loss, kl, ce: fp32, []
    """Only `loss` is differentiable, in x and w. Without a token that counts all three are 0.

    Raises JetExportError for shapes that do not fit each other, or a temperature or chunk that is not positive."""
    T, V = labels.shape[0], w.shape[0]
    chunk = max(1, LOGITS // V) if chunk is None else chunk
    if (x.shape[0], x_teacher.shape[0], w_teacher.shape[0]) != (T, T, V):
        raise JetExportError(
            f"linear_kl: x {tuple(x.shape)}, w {tuple(w.shape)}, x_teacher {tuple(x_teacher.shape)}, "
            f"w_teacher {tuple(w_teacher.shape)}, labels {tuple(labels.shape)}.",
            "Both x have a row a label, and student and teacher one vocabulary.",
        )
    if not (temperature > 0 and chunk > 0):
        raise JetExportError(f"linear_kl: temperature {temperature}, chunk {chunk}.", "Both are positive.")
    grad = torch.is_grad_enabled()
    kl, ce, loss, _, _ = linear_kl_op(
        x, w, x_teacher.detach(), w_teacher.detach(), labels, kl_weight, ce_weight, temperature, chunk,
        grad and x.requires_grad, grad and w.requires_grad,
    )  # fmt: skip
    return loss, kl.detach(), ce.detach()
