"""The bytes that an engine takes, counted from the architecture."""

import pytest
import torch

from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import MemoryBudget, engine_memory
from jet_export.model.presets import jet_2b


def test_memory_of_the_published_models() -> None:
    """The states of the paper's sizes: 28 MB a sequence for jet-2b in fp32, KV of two layers at 64K."""
    c = jet_2b()
    limits = Limits(max_batch_size=128, max_seq_len=65536, prefill_chunk=2048)
    m = engine_memory(c, limits, Dtypes(model=torch.bfloat16, kv_cache=torch.bfloat16), weights=0)
    assert m.recurrent_states == 128 * 24 * 12 * 96 * 256 * 4
    assert m.kv_full == 128 * 2 * 65536 * 2 * 2 * 128 * 2
    assert m.kv_window == 128 * 2 * (25 + 1) * 128 * 2 * 2 * 128 * 2


@pytest.mark.parametrize("available", [4.0e9, 4.1e9, 20e9, 130e9])
def test_the_largest_batch_fits_and_one_more_does_not(available: float) -> None:
    dtypes = Dtypes(model=torch.bfloat16, kv_cache=torch.bfloat16)
    budget = MemoryBudget(config=jet_2b(), dtypes=dtypes, weights=4 * 10**9, available=int(available))
    n = budget.largest_batch(max_seq_len=4096, prefill_chunk=2048)

    def total(batch: int) -> int:
        return budget.memory(Limits(max_batch_size=batch, max_seq_len=4096, prefill_chunk=2048)).total

    assert (n == 0 or total(n) <= available) and total(n + 1) > available
