"""Random arguments of jet::attention for the tests, its definition in fp64, and FP8 for Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from jet_export.kernels.attention import attention_ref, quantize_ref, rope_ref
from jet_export.kernels.attention_decode import DecodeConfig, attention_decode_triton
from jet_export.kernels.attention_prefill import PrefillConfig, attention_prefill_triton
from jet_export.kernels.attention_verify import attention_verify_triton
from jet_export.kernels.form import Form

FP8 = torch.float8_e4m3fn


@dataclass
class Case:
    """Arguments of the op, in its order."""

    qkv: Tensor
    cos_sin: Tensor
    kv_cache: Tensor
    block_table: Tensor
    cu_seqlens: Tensor
    slots: Tensor
    context_lens: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    k_scale: float = 1.0
    v_scale: float = 1.0

    def args(self, device: str = "cpu") -> list:
        """Everything but `form`; the cache is a copy, strides are kept."""
        values = [getattr(self, f.name) for f in fields(self)]
        values[2] = values[2].clone()
        return [v.to(device) if isinstance(v, Tensor) else v for v in values]

    def op_args(self, device: str = "cpu") -> tuple:
        return *self.args(device), int(Form.DECODE if self.qkv.shape[0] == self.slots.shape[0] else Form.MIXED)

    def run(self, form: str, device: str = "cpu", small: bool = True) -> tuple[Tensor, Tensor]:
        """(outputs, cache) on the CPU, of the reference or of a kernel; `small` tiles make several of a short case."""
        args = self.args(device)
        page = self.kv_cache.shape[3]
        if form == "ref":
            return attention_ref(*args).cpu(), args[2].cpu()
        prefill: Callable[..., Tensor] = attention_prefill_triton
        decode: Callable[..., Tensor] = attention_decode_triton
        tiles: tuple[Any, Any] = None, None
        if small:
            tiles = PrefillConfig(32, min(page, 16), 4, 1), DecodeConfig(min(page, 16), 4, 1, 1)
        if form == "verify":
            verify: Callable[..., Tensor] = attention_verify_triton
            return verify(*args, config=tiles[1]).cpu(), args[2].cpu()
        o = None
        if form != "decode":
            o = prefill(*args, config=tiles[0], mixed=form == "mixed")
        if form != "prefill":
            o = decode(*args, config=tiles[1], out=o)
        assert o is not None
        return o.cpu(), args[2].cpu()


def make_case(
    lens,
    context,
    heads=(4, 2),
    head_dim=32,
    page=16,
    dtype=torch.float32,
    cache_dtype=None,
    M=None,
    seed=0,
    rotary=None,
    **options,
) -> Case:
    """Ragged sequences with scattered pages in a pool with three pages that no sequence owns. rotary: the columns of a
    head that are rotated; all."""
    gen = torch.Generator().manual_seed(seed)
    (Hq, Hkv), N = heads, len(lens)
    total = max(n + c for n, c in zip(lens, context, strict=True))
    M = M or -(-total // page) + 1
    R = rotary or head_dim
    angle = torch.arange(total + 1)[:, None] * 1e4 ** (-torch.arange(0, R, 2) / R)
    return Case(
        torch.randn(sum(lens), (Hq + 2 * Hkv) * head_dim, generator=gen).to(dtype),
        torch.cat((angle.cos(), angle.sin()), 1).to(dtype),
        torch.randn(N * M + 3, 2, Hkv, page, head_dim, generator=gen).to(cache_dtype or dtype),
        torch.randperm(N * M + 3, generator=gen)[: N * M].view(N, M).int(),
        torch.tensor([0, *lens]).cumsum(0).int(),
        torch.arange(N).int(),
        torch.tensor(context).int(),
        Hq,
        Hkv,
        head_dim,
        **options,
    )


def poison(c: Case) -> Case:
    """NaN wherever nothing was written or nothing may be read; unused table entries name a page of NaN."""
    page, M = c.kv_cache.shape[3], c.block_table.shape[1]
    held = torch.zeros(c.kv_cache.shape[0], page, dtype=torch.bool)
    used = torch.zeros(c.block_table.shape, dtype=torch.bool)
    lens = c.cu_seqlens.diff().tolist()
    for n, (context, slot) in enumerate(zip(c.context_lens.tolist(), c.slots.tolist(), strict=True)):
        first = max(0, context - c.window + 1) if c.window else 0
        for p in range(first, context + lens[n] if slot >= 0 else first):
            used[n, p // page % M] = True
            held[c.block_table[n, p // page % M], p % page] |= p < context
    unowned = [i for i in range(held.shape[0]) if i not in c.block_table]
    cache = c.kv_cache.float().masked_fill(~held[:, None, None, :, None], float("nan")).to(c.kv_cache.dtype)
    return replace(c, kv_cache=cache, block_table=torch.where(used, c.block_table, unowned[0]))


def pick(c: Case, rows: list[int]) -> Case:
    """The case of these sequences alone."""
    bounds = c.cu_seqlens.tolist()
    qkv = torch.cat([c.qkv[bounds[n] : bounds[n + 1]] for n in rows])
    lens = c.cu_seqlens.diff()[rows]
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int32), lens.cumsum(0).int()))
    return replace(
        c,
        qkv=qkv,
        block_table=c.block_table[rows],
        cu_seqlens=cu_seqlens,
        slots=c.slots[rows],
        context_lens=c.context_lens[rows],
    )


def in_steps(c: Case, steps: list[int], form: str, device: str = "cpu") -> Tensor:
    """Outputs of equally long sequences fed `steps` tokens a call, the cache carried along; decode takes steps of 1."""
    N, start, out = c.slots.shape[0], 0, []
    qkv = c.qkv.view(N, -1, c.qkv.shape[1])
    for step in steps:
        part = replace(
            c,
            qkv=qkv[:, start : start + step].flatten(0, 1),
            cu_seqlens=torch.arange(N + 1).int() * step,
            context_lens=c.context_lens + start,
        )
        o, cache = part.run("prefill" if form == "decode" and step > 1 else form, device)
        c, start = replace(c, kv_cache=cache), start + step
        out.append(o.view(N, step, -1))
    return torch.cat(out, 1).flatten(0, 1)


def oracle(c: Case) -> Tensor:
    """Dense attention in fp64, one token and one head at a time, from the definition."""
    G, page, M = c.num_heads // c.num_kv_heads, c.kv_cache.shape[3], c.block_table.shape[1]
    scales = torch.tensor([c.k_scale, c.v_scale] if c.kv_cache.dtype == FP8 else [1.0, 1.0]).double()[:, None, None]
    x = c.qkv.view(c.qkv.shape[0], -1, c.head_dim)
    o = torch.zeros(c.qkv.shape[0], c.num_heads, c.head_dim, dtype=torch.float64)
    for n in (c.slots >= 0).nonzero()[:, 0].tolist():
        context, keys = int(c.context_lens[n]), {}
        for p in range(max(0, context - M * page), context):
            keys[p] = c.kv_cache[int(c.block_table[n, p // page % M]), :, :, p % page].double() * scales
        for t in range(int(c.cu_seqlens[n]), int(c.cu_seqlens[n + 1])):
            p = context + t - int(c.cu_seqlens[n])
            q, k, v = x[t, None].split((c.num_heads, c.num_kv_heads, c.num_kv_heads), 1)
            q, k = (rope_ref(y, c.cos_sin[p, None]) for y in (q, k))
            new = [quantize_ref(y[0], s, c.kv_cache.dtype).double() for y, s in ((k, c.k_scale), (v, c.v_scale))]
            keys[p] = torch.stack(new) * scales  # [2, Hkv, Dh]
            seen = torch.stack([keys[j] for j in sorted(keys) if j <= p and (not c.window or j > p - c.window)])
            for h in range(c.num_heads):
                w = torch.softmax(seen[:, 0, h // G] @ q[0, h].double() * c.head_dim**-0.5, 0)
                o[t, h] = w @ seen[:, 1, h // G]
    return o.flatten(1)


def interpreter_fp8(monkeypatch) -> None:
    """Triton's interpreter truncates fp32 to FP8; the GPU rounds to nearest even, as torch does."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(x, input_dtype, output_dtype, mode):
        if (input_dtype, output_dtype) != (tl.float32, tl.float8e4nv):
            return convert(x, input_dtype, output_dtype, mode)
        values = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
        return values.to(FP8).view(torch.uint8).numpy().reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
