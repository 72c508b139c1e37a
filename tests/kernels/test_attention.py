"""jet::attention: the reference against a dense fp64 oracle, and the laws of the op."""

from dataclasses import dataclass, replace

import pytest
import torch
from jet_export.kernels.attention import attention_ref, quantize_ref, rope_ref
from torch import Tensor

FP8 = torch.float8_e4m3fn


def rel(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


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

    def args(self) -> tuple:
        """Everything but `decode`, with a fresh copy of the cache."""
        a = list(self.__dict__.values())
        a[2] = a[2].clone()
        return tuple(a)

    def op_args(self) -> tuple:
        return *self.args(), self.qkv.shape[0] == self.slots.shape[0]


def make_case(
    lens, context, heads=(4, 2), head_dim=32, page=16, dtype=torch.float32, cache_dtype=None, M=None, seed=0, **kw
) -> Case:
    gen = torch.Generator().manual_seed(seed)
    (Hq, Hkv), N = heads, len(lens)
    total = max(n + c for n, c in zip(lens, context, strict=True))
    M = M or -(-total // page) + 1
    inv_freq = 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(total + 1)[:, None] * inv_freq
    cache = torch.randn(N * M + 3, 2, Hkv, page, head_dim, generator=gen)
    return Case(
        torch.randn(sum(lens), (Hq + 2 * Hkv) * head_dim, generator=gen).to(dtype),
        torch.cat((angle.cos(), angle.sin()), 1).to(dtype),
        cache.to(cache_dtype or dtype),
        torch.randperm(N * M + 3, generator=gen)[: N * M].view(N, M).int(),
        torch.tensor([0, *lens]).cumsum(0).int(),
        torch.arange(N).int(),
        torch.tensor(context).int(),
        Hq,
        Hkv,
        head_dim,
        **kw,
    )


def oracle(c: Case) -> Tensor:
    """Dense attention in fp64, one token and one head at a time, from the definition."""
    G, page, M = c.num_heads // c.num_kv_heads, c.kv_cache.shape[3], c.block_table.shape[1]
    cache = c.kv_cache.double()
    if c.kv_cache.dtype == FP8:
        cache = cache * torch.tensor([c.k_scale, c.v_scale]).double().view(1, 2, 1, 1, 1)
    x = c.qkv.view(c.qkv.shape[0], -1, c.head_dim)
    o = torch.zeros(c.qkv.shape[0], c.num_heads, c.head_dim, dtype=torch.float64)
    for n in range(len(c.slots)):
        if c.slots[n] < 0:
            continue
        keys, ctx = {}, int(c.context_lens[n])
        for p in range(max(0, ctx - M * page), ctx):
            keys[p] = cache[c.block_table[n, p // page % M].item(), :, :, p % page]  # [2, Hkv, Dh]
        for t in range(int(c.cu_seqlens[n]), int(c.cu_seqlens[n + 1])):
            p = ctx + t - int(c.cu_seqlens[n])
            r = rope_ref(x[t, None, : c.num_heads + c.num_kv_heads], c.cos_sin[p, None])[0]
            kv = torch.stack((r[c.num_heads :], x[t, c.num_heads + c.num_kv_heads :]))
            for i, scale in enumerate((c.k_scale, c.v_scale)):
                kv_i = quantize_ref(kv[i], scale, c.kv_cache.dtype).double()
                keys[p] = keys.get(p, torch.zeros_like(kv, dtype=torch.float64))
                keys[p][i] = kv_i * (scale if c.kv_cache.dtype == FP8 else 1)
            seen = torch.stack([keys[j] for j in sorted(keys) if j <= p and (not c.window or j > p - c.window)])
            for h in range(c.num_heads):
                w = torch.softmax(seen[:, 0, h // G] @ r[h].double() * c.head_dim**-0.5, 0)
                o[t, h] = w @ seen[:, 1, h // G]
    return o.flatten(1)


RAGGED = [([5, 1, 40, 3], [0, 0, 21, 63]), ([1, 1, 1], [0, 16, 47]), ([33], [0]), ([1], [0])]


@pytest.mark.parametrize("cache_dtype", [None, FP8])
@pytest.mark.parametrize("window", [0, 1, 7, 20])
@pytest.mark.parametrize("lens, context", RAGGED)
def test_reference_is_the_definition(lens, context, window, cache_dtype):
    c = make_case(lens, context, window=window, cache_dtype=cache_dtype, k_scale=0.02, v_scale=0.5)
    assert rel(attention_ref(*c.args()), oracle(c)) < 1e-6


@pytest.mark.parametrize("lens, context", [([5, 1, 9], [0, 3, 21]), ([1, 1, 1], [0, 16, 47])])
def test_opcheck_and_compile(lens, context):
    c = make_case(lens, context, window=20)
    c.slots[1] = -1
    for qkv in (c.qkv, c.qkv.T.contiguous().T, torch.cat((c.qkv, c.qkv), 1)[:, : c.qkv.shape[1]]):
        c = replace(c, qkv=qkv)
        torch.library.opcheck(torch.ops.jet.attention_cpu.default, c.op_args())
        torch.library.opcheck(torch.ops.jet.attention.default, c.op_args())
    for cache in (c.kv_cache, c.kv_cache.to(FP8)):
        c = replace(c, kv_cache=cache)
        eager, compiled = c.op_args(), c.op_args()
        o = torch.ops.jet.attention(*eager)
        f = torch.compile(lambda *a: torch.ops.jet.attention(*a), fullgraph=True)
        assert torch.equal(o, f(*compiled))
        assert torch.equal(eager[2].view(torch.uint8), compiled[2].view(torch.uint8))
