"""The packing of verifying calls: every token in its row, and padding rows that fill a size exactly."""

import random
from itertools import pairwise

import pytest

from jet_export.runtime.verify_calls import (
    ROW,
    VerifySize,
    invariant_size,
    pack_rows,
    split_rows,
    verify_size,
    verify_sizes,
)


def check(size: VerifySize, slots: list[int], rows: list[list[int]], held: list[int]) -> None:
    ids, cu_seqlens, packed_slots, context_lens = (
        x.tolist() for x in split_rows(pack_rows(slots, rows, held, size), size)
    )
    lens = [b - a for a, b in pairwise(cu_seqlens)]
    assert (len(ids), len(packed_slots), cu_seqlens[-1]) == (size.tokens, size.rows, size.tokens)
    n, total = len(rows), sum(map(len, rows))
    assert lens[:n] == [len(row) for row in rows] and all(1 <= length <= ROW for length in lens)
    assert ids[:total] == [t for row in rows for t in row] and not any(ids[total:])
    assert packed_slots == [*slots, *[-1] * (size.rows - n)]
    assert context_lens == [*held, *[0] * (size.rows - n)]


@pytest.mark.parametrize("most", [2, 5, ROW])
def test_a_call_is_filled_exactly_whatever_is_drafted(most: int) -> None:
    rng = random.Random(most)
    for n in [*range(1, 20), 33, 64, 100, 128]:
        for lens in ([1] * n, [most] * n, [rng.randint(1, most) for _ in range(n)]):
            rows = [[-1 - i, *range(100, 99 + length)] for i, length in enumerate(lens)]
            held = [rng.randrange(1000) for _ in rows]
            for size in (verify_size(sum(lens), n), VerifySize(tokens=sum(lens), rows=n)):
                check(size, list(range(n)), rows, held)
            if most < ROW:
                check(invariant_size(128, most), list(range(n)), rows, held)


def test_all_sizes_of_serving_are_captured_and_hold_padding_alone() -> None:
    sizes = verify_sizes(16, 5)
    assert sizes == sorted(sizes, key=lambda size: (-size.tokens, -size.rows)) and len(sizes) < 40
    assert {verify_size(t, n) for n in range(1, 17) for t in range(n, 5 * n + 1)} == set(sizes)
    for size in [*sizes, invariant_size(16, 5)]:
        check(size, [], [], [])


@pytest.mark.parametrize("most", [2, 5, ROW])
def test_sizes_are_few_and_hardly_larger_than_the_call(most: int) -> None:
    """Of 64 rows: one or two numbers of padding rows, less than a sixth too many tokens, and nearly none where all
    drafts are whole."""
    sizes = {tokens: verify_size(tokens, 64) for tokens in range(64, 64 * most + 1)}
    assert len(set(sizes.values())) <= 20 + most
    for tokens, size in sizes.items():
        assert tokens < size.tokens <= 1.17 * tokens + 17 and 64 < size.rows <= 73
    assert sizes[64 * most].tokens <= 64 * most + size.rows - 64


def test_the_sizes_of_a_full_batch_can_be_captured_alone() -> None:
    full = verify_sizes(16, 5, least_rows=16)
    assert set(full) == {verify_size(t, 16) for t in range(16, 81)} < set(verify_sizes(16, 5))
