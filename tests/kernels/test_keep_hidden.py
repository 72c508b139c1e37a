"""jet::keep_hidden: the kernel is its reference; tokens go to their pages, and nothing goes anywhere else."""

import pytest
import torch
from helpers.checked_memory import checked_memory
from torch import Tensor

from jet_export.kernels.common import INTERPRET
from jet_export.kernels.keep_hidden import keep_hidden_ref, keep_hidden_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENS, HELD, SLOTS = [1, 3, 18, 2], [0, 5, 14, 30], [2, -1, 0, 1]  # the second sequence is padding
PAGE, PAGES, M = 16, 13, 3
LARGE = 2**31 - 1


def arguments(D: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(D)
    h, kept = torch.randn(D, sum(LENS), generator=rng).t(), torch.randn(PAGES, 1, 1, PAGE, D, generator=rng)
    table = torch.randperm(PAGES, generator=rng)[: M * len(LENS)].view(len(LENS), M).int()
    ends = torch.tensor([0, *torch.tensor(LENS).cumsum(0).tolist()], dtype=torch.int32)
    return [h, kept, table, ends, *(torch.tensor(x, dtype=torch.int32) for x in (SLOTS, HELD))]


@pytest.mark.parametrize("D", [32, 96, 2049])
def test_the_kernel_is_its_reference(D: int) -> None:
    h, kept, *batch = arguments(D)
    want, got = kept.clone(), kept.to(DEVICE)
    keep_hidden_ref(h, want, *batch)
    keep_hidden_triton(h.to(DEVICE), got, *(x.to(DEVICE) for x in batch))
    assert torch.equal(got.cpu(), want)


def test_tokens_go_to_their_pages_and_padding_nowhere() -> None:
    h, kept, table, ends, slots, held = arguments(32)
    before = kept.clone()
    keep_hidden_ref(h, kept, table, ends, slots, held)
    written = set[tuple[int, int]]()
    for n, first in enumerate(ends[:-1].tolist()):
        for i in range(LENS[n] if slots[n] >= 0 else 0):
            page, offset = int(table[n, (HELD[n] + i) // PAGE]), (HELD[n] + i) % PAGE
            assert torch.equal(kept[page, 0, 0, offset], h[first + i])
            written.add((page, offset))
    changed = (kept != before).any(-1)[:, 0, 0].nonzero().tolist()
    assert {(p, o) for p, o in changed} == written


@pytest.mark.skipif(not INTERPRET, reason="checks memory in Triton's interpreter, which is off on a GPU")
@pytest.mark.parametrize("spoilt", [2, 3, 4, 5], ids=["block_table", "cu_seqlens", "slots", "context_lens"])
@pytest.mark.parametrize("value", [-LARGE - 1, -1, LARGE])
def test_whatever_the_batch_holds_nothing_outside_is_touched(spoilt: int, value: int) -> None:
    args = arguments(32)
    args[0] = args[0].contiguous()  # no copy is made
    args[spoilt] = torch.full_like(args[spoilt], value)
    with checked_memory(args):
        keep_hidden_triton(*args)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.jet.keep_hidden, tuple(arguments(32)))
