"""Batch invariance of jet::jet_block and jet::attention: the same bits alone and anywhere in a batch."""

import itertools

import pytest
import torch
from helpers.packed import Packed
from helpers.paged import make_case, pick

from jet_export.kernels import jet_block  # noqa: F401  registers the op
from jet_export.kernels.state_layout import NO_BUFFER

CASES = {  # tokens and tokens held of each sequence
    "decode": ([1] * 6, [500, 3, 40, 0, 129, 300]),
    "prefill": ([7, 50, 1, 64, 33, 130], [5, 80, 200, 0, 3, 64]),
}
BLOCK_TOKENS = ("qkuz", "ba", "kappa")
BLOCK_ROWS = ("slots", "context_lens")


@pytest.mark.parametrize("form", CASES)
@pytest.mark.parametrize("H", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jet_block(device, form: str, H: int, dtype) -> None:
    lens, context = CASES[form]
    p = Packed(lens, H=H, V=40, dtype=dtype, context=context, device=device)
    names, rest = list(p.tensors), p.block_args(form == "decode")[len(p.tensors) :]
    together = dict(zip(names, p.block_args(form == "decode"), strict=False))
    out = torch.ops.jet.jet_block(*together.values(), *rest, *NO_BUFFER, None)
    bounds = p.cu_seqlens.tolist()
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone = {k: x.clone() for k, x in p.tensors.items()}
        alone.update({k: alone[k][start:end].clone() for k in BLOCK_TOKENS})
        alone.update({k: alone[k][n : n + 1].clone() for k in BLOCK_ROWS})
        alone["cu_seqlens"] = torch.tensor([0, end - start], dtype=torch.int32, device=device)
        assert torch.equal(torch.ops.jet.jet_block(*alone.values(), *rest, *NO_BUFFER, None), out[start:end])
        row = int(p.slots[n])
        for state in ("conv_state", "recurrent_state"):
            assert torch.equal(alone[state][row], together[state][row])


@pytest.mark.parametrize("form", CASES)
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(form: str, window: int, dtype) -> None:
    """On the CPU; on a GPU the decode kernel's splits follow the number of rows (`--deterministic` fixes it)."""
    lens, context = CASES[form]
    case = make_case(lens, context, dtype=dtype, window=window)
    out, cache = case.run("ref")
    bounds = case.cu_seqlens.tolist()
    for n in range(len(lens)):
        alone, alone_cache = pick(case, [n]).run("ref")
        assert torch.equal(alone, out[bounds[n] : bounds[n + 1]])
        pages = case.block_table[n].long()
        assert torch.equal(alone_cache[pages], cache[pages])
