"""Whatever cu_seqlens, slots, context_lens and block_table hold, no kernel accesses memory outside its tensors or
loops without bound.

A TensorRT builder may time the plugins on meaningless inputs. Here every load and store of the interpreted kernels is
checked; on a GPU benchmarks/kernels/hostile_enqueues.py enqueues the plugins under compute-sanitizer.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checked_memory import checked_memory
from helpers.packed import Packed
from helpers.paged import FP8, interpreter_fp8, make_case

from jet_export.kernels.attention_decode import DecodeConfig, attention_decode_triton
from jet_export.kernels.attention_prefill import PrefillConfig, attention_prefill_triton
from jet_export.kernels.common import INTERPRET
from jet_export.kernels.form import Form
from jet_export.kernels.jet_block import jet_block_triton

pytestmark = [
    pytest.mark.skipif(not INTERPRET, reason="checks memory in Triton's interpreter, which is off on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # int32 wraps around and NaN appears, as on a GPU
]
LENS, N = [2, 17, 1], 3
SMALL, LARGE = -(2**31), 2**31 - 1


def integers(kind: str, shape: tuple[int, ...], like: torch.Tensor, seed: int) -> torch.Tensor:
    """Hostile int32 values: of any size, close to the valid ones, or all the same extreme."""
    gen = torch.Generator().manual_seed(seed)
    if kind == "any":
        return torch.randint(SMALL, LARGE, shape, generator=gen).int()
    if kind == "near":  # negative, not monotone, a little too large
        most = int(like.max()) + 3
        return torch.randint(-3, most + 20, shape, generator=gen).int()
    if kind == "falling":
        return like.flip(0)
    return torch.full(shape, {"smallest": SMALL, "largest": LARGE}[kind], dtype=torch.int32)


KINDS = ["any", "near", "falling", "smallest", "largest"]
block: Callable[..., torch.Tensor] = jet_block_triton
BATCH = ["cu_seqlens", "slots", "context_lens"]


def spoilt(kind: str, names: list) -> list[list]:
    """All inputs together, and for one kind each input alone."""
    return [names, *([name] for name in names if kind == "any")]


def block_tensors(form: Form) -> dict[str, Any]:
    p = Packed([1] * N if form == Form.DECODE else LENS, H=1, K=16, V=16, context=[0, 5, 9], extra=16)
    return p.tensors


def run_block(tensors: dict[str, Any], form: Form, limit: int = 1 << 40) -> int:
    with checked_memory(list(tensors.values()), limit) as memory:
        block(*tensors.values(), 1, 16, 16, 1e-5, form)
    return memory.accesses


@pytest.mark.parametrize("form", [Form.MIXED, Form.DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("kind", KINDS)
def test_jet_block_stays_inside(kind, form):
    valid = run_block(block_tensors(form), form)
    for seed, names in enumerate(spoilt(kind, BATCH)):
        tensors = block_tensors(form)
        for name in names:
            tensors[name] = integers(kind, tuple(tensors[name].shape), tensors[name], seed)
        run_block(tensors, form, limit=(N + 1) * valid)  # every sequence may claim all the tokens


def run_attention(args: list, form: Form, limit: int = 1 << 40) -> int:
    with checked_memory(args, limit) as memory:
        prefill: Callable[..., torch.Tensor] = attention_prefill_triton
        decode: Callable[..., torch.Tensor] = attention_decode_triton
        o = None
        if form != Form.DECODE:
            o = prefill(*args, config=PrefillConfig(16, 16, 4, 1), mixed=form == Form.MIXED)
        if form != Form.PREFILL:
            decode(*args, config=DecodeConfig(16, 4, 1, 1), out=o)
    return memory.accesses


@pytest.mark.parametrize("form", [Form.MIXED, Form.DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    "kind, window, dtype",
    [
        *((kind, 0, torch.float32) for kind in KINDS),
        *((kind, 20, torch.float32) for kind in ("any", "near", "largest")),
        ("any", 20, FP8),
    ],
)
def test_attention_stays_inside(kind, dtype, window, form, monkeypatch):
    interpreter_fp8(monkeypatch)
    M, lens = 2, [1] * N if form == Form.DECODE else LENS
    full = [M * 16 - n for n in lens]
    c = make_case(lens, full, (2, 1), 16, cache_dtype=dtype, M=M, window=window, k_scale=0.5)
    valid = run_attention(c.args(), form)
    for seed, names in enumerate(spoilt(kind, [3, 4, 5, 6])):
        args = c.args()
        for i in names:
            args[i] = integers(kind, tuple(args[i].shape), args[i], seed).contiguous()
        run_attention(args, form, limit=8 * valid)


def test_a_slot_that_no_pool_has_is_padding():
    tensors = block_tensors(Form.DECODE)
    tensors["slots"] = torch.tensor([2, 5, -1], dtype=torch.int32)  # of 5 rows
    before = tensors["recurrent_state"].clone()
    o = block(*tensors.values(), 1, 16, 16, 1e-5, Form.DECODE)
    changed = (tensors["recurrent_state"] != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False, False]
    assert o.abs().amax(1).gt(0).tolist() == [True, False, False]
