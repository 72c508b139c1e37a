"""Packed calls: what goes in comes out, every sequence has a token, and padding owns what is left over."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jet_export.bundle.limits import Limits
from jet_export.runtime.calls import ALIGNED, ALONE, MAX_TOKENS, captured_size, decode_bucket, pack, service_sizes
from jet_export.runtime.pacing import usual_prompt_tokens

LIMITS = Limits(max_batch_size=256, max_seq_len=4096, prefill_chunk=2048)
TOKENS = st.one_of(st.none(), st.lists(st.integers(0, 151_935), min_size=1, max_size=40))


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(TOKENS, min_size=1, max_size=80), captured=st.booleans())
def test_a_packed_call_holds_its_sequences(tokens: list[list[int] | None], captured: bool) -> None:
    slots, held = [3 * i for i in range(len(tokens))], [7 + i for i in range(len(tokens))]
    lens = [1 if t is None else len(t) for t in tokens]
    wanted = captured_size(sum(lens), len(lens), LIMITS) if captured else None
    packed, size = pack(slots, tokens, held, wanted)
    assert packed.dtype == torch.int32 and len(packed) == size.integers
    assert all(part.data_ptr() % (4 * ALIGNED) == packed.data_ptr() % (4 * ALIGNED) for part in size.split(packed))
    ids, ends, rows, context, outputs = (part.tolist() for part in size.split(packed))
    bounds = list(itertools.pairwise(ends))
    assert ends[0] == 0 and ends[-1] == size.tokens == len(ids) and all(b > a for a, b in bounds)
    for i, given_tokens in enumerate(tokens):
        assert ids[slice(*bounds[i])] == ([-1 - slots[i]] if given_tokens is None else given_tokens)
        assert (rows[i], context[i], outputs[i]) == (slots[i], held[i], bounds[i][1] - 1)
    padding = slice(len(tokens), None)
    assert all(slot == -1 for slot in rows[padding]) and not any(context[padding])
    assert all(0 <= row < size.tokens for row in outputs) and len(outputs) >= len(tokens)
    assert size.sequences == len(tokens) if wanted is None else size.sequences > len(tokens)


@pytest.mark.parametrize("sequences", [1, 8, 9, 63, 64, 65, 255, 256])
def test_captured_sizes_are_few_and_waste_little(sequences: int) -> None:
    sizes = {captured_size(n, sequences, LIMITS) for n in range(sequences, MAX_TOKENS)} - {None}
    assert len(sizes) <= 8 + 28
    for n in range(sequences, MAX_TOKENS - 128):
        size = captured_size(n, sequences, LIMITS)
        assert size is not None and size.sequences <= LIMITS.max_batch_size + 1
        assert size.tokens - n <= 64 + max(8, sequences // 2) and size.tokens <= MAX_TOKENS


def test_a_decode_step_has_at_most_half_its_rows_more() -> None:
    buckets = [decode_bucket(n) for n in range(1, 1025)]
    assert sorted(set(buckets)) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(n <= bucket <= max(1.5 * n, n + 3) for n, bucket in enumerate(buckets, 1))


def test_a_call_longer_than_the_graphs_is_not_captured() -> None:
    assert captured_size(MAX_TOKENS + 1, 4, LIMITS) is None
    assert captured_size(100, 4, Limits(max_batch_size=2, max_seq_len=256, prefill_chunk=32)) is None  # 64 at most


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 3, 16, 64, 256]), st.integers(0, 2**32), st.sampled_from([64, 500, 2048]))
def test_the_sizes_of_a_service_are_all_that_its_steps_have(slots: int, seed: int, budget: int) -> None:
    limits = Limits(max_batch_size=slots, max_seq_len=4096, prefill_chunk=2048)
    budget = max(budget, slots)
    sizes = service_sizes(slots, budget, usual_prompt_tokens, limits)
    assert len(set(sizes)) == len(sizes) <= 240
    rng = random.Random(seed)
    for _ in range(50):
        decoding = rng.randint(0, slots)
        prompts = rng.randint(0, slots - decoding)
        most = budget - decoding if not decoding else min(budget - decoding, usual_prompt_tokens(decoding))
        if not prompts or most < prompts or (not decoding and prompts > ALONE):
            continue
        tokens = decoding + rng.randint(prompts, most)
        assert captured_size(tokens, decoding + prompts, limits) in {None, *sizes}
