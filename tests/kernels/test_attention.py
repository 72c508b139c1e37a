"""jet::attention on the CPU: the reference is the definition, and the op can be exported and compiled."""

from dataclasses import replace

import pytest
import torch
from helpers.compare import relative_error, same_bits
from helpers.paged import FP8, make_case, oracle

from jet_export.kernels.attention import attention_ref, rope_ref

RAGGED = [([5, 1, 40, 3], [0, 0, 21, 63]), ([1, 1, 1], [0, 16, 47]), ([33], [0]), ([1], [0])]


@pytest.mark.parametrize("cache_dtype", [None, FP8])
@pytest.mark.parametrize("window", [0, 1, 7, 20])
@pytest.mark.parametrize("lens, context", RAGGED)
def test_reference_is_the_definition(lens, context, window, cache_dtype):
    """With an FP8 cache every key and value is rounded to FP8, the current token's included."""
    c = make_case(lens, context, window=window, cache_dtype=cache_dtype, k_scale=0.02, v_scale=0.5)
    assert relative_error(attention_ref(*c.args()), oracle(c)) < 1e-6


def test_fp8_saturates():
    c = make_case([9], [0], cache_dtype=FP8, k_scale=1e-3, v_scale=1e-3)
    o, cache = c.run("ref")
    assert relative_error(o, oracle(c)) < 1e-6
    assert cache.float()[c.block_table[0, 0].long(), 1, :, :9].abs().max() == 448


@pytest.mark.parametrize("heads", [(2, 2), (6, 1), (8, 1)])
def test_grouped_queries(heads):
    c = make_case([7, 2], [0, 30], heads=heads, window=9)
    assert relative_error(attention_ref(*c.args()), oracle(c)) < 1e-6


def test_columns_beyond_the_rotary_table_are_not_rotated():
    """The first 16 of 64 as a head of 16 is; a pair of columns turns by the angle of its row."""
    x, angle = torch.randn(5, 3, 64, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    y = rope_ref(x, torch.cat([angle.cos(), angle.sin()], 1))
    assert torch.equal(y[..., 16:], x[..., 16:])
    turned = torch.polar(torch.ones_like(angle), angle)[:, None] * torch.complex(x[..., :8], x[..., 8:16])
    assert relative_error(y[..., :16], torch.cat([turned.real, turned.imag], -1)) < 1e-12
    for rotary in (2, 20):
        c = make_case([7, 2], [0, 30], rotary=rotary)
        assert relative_error(attention_ref(*c.args()), oracle(c)) < 1e-6


def test_positions_beyond_the_rotary_table_use_its_last_row():
    c = make_case([3], [20])
    short, long = replace(c, cos_sin=c.cos_sin[:21]), replace(c, cos_sin=c.cos_sin.clone())
    long.cos_sin[21:] = c.cos_sin[20]
    assert torch.equal(attention_ref(*short.args()), attention_ref(*long.args()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_round_rope_and_output_only(dtype):
    c = make_case([20, 1], [0, 40], dtype=dtype)
    assert relative_error(attention_ref(*c.args()), oracle(c)) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("lens, context", [([5, 1, 9], [0, 3, 21]), ([1, 1, 1], [0, 16, 47])])
def test_opcheck_with_any_strides(lens, context):
    c = make_case(lens, context, window=20)
    c.slots[1] = -1
    wide = torch.cat((c.qkv, c.qkv), 1)
    for qkv in (c.qkv, c.qkv.T.contiguous().T, wide[:, : c.qkv.shape[1]]):
        strided = replace(c, qkv=qkv)
        torch.library.opcheck(torch.ops.jet.attention_cpu.default, strided.op_args())
        torch.library.opcheck(torch.ops.jet.attention.default, strided.op_args())


@pytest.mark.parametrize("cache_dtype", [None, FP8])
@pytest.mark.parametrize("lens, context", [([5, 1, 9], [0, 3, 21]), ([1, 1, 1], [0, 16, 47])])
def test_compile_fullgraph(lens, context, cache_dtype):
    c = make_case(lens, context, window=20, cache_dtype=cache_dtype)
    eager, compiled = c.op_args(), c.op_args()
    f = torch.compile(lambda *a: torch.ops.jet.attention(*a), fullgraph=True)
    assert torch.equal(torch.ops.jet.attention(*eager), f(*compiled))
    assert same_bits(eager[2], compiled[2])
    assert not same_bits(eager[2], c.kv_cache)
