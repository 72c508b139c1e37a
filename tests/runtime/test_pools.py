"""Pools and arenas give each slot, page and byte to one holder."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from jet_export.runtime.pools import Arena, Pool


@given(st.data())
def test_an_arena_gives_each_byte_once(data) -> None:
    arena, parts = Arena(100), dict[int, int]()
    for _ in range(data.draw(st.integers(0, 30))):
        if parts and data.draw(st.booleans()):
            first = data.draw(st.sampled_from(sorted(parts)))
            arena.give(first)
            del parts[first]
            continue
        n = data.draw(st.integers(1, 40))
        at = arena.take(n)
        ends = sorted([(f, f + m) for f, m in parts.items()] + [(0, 0), (100, 100)])
        longest = max(b - a for (_, a), (b, _) in pairwise(ends))
        assert (at is None) == (n > longest)
        if at is not None:
            assert 0 <= at <= 100 - n and all(at + n <= a or b <= at for a, b in ends if a < b)
            parts[at] = n
        assert arena.used == sum(parts.values())
    for first in parts:
        arena.give(first)
    assert arena.gaps == [(0, 100)]


@given(st.integers(0, 20), st.data())
def test_a_pool_gives_each_item_once(size: int, data) -> None:
    pool = Pool(size)
    n = data.draw(st.integers(0, size))
    first = pool.take(n)
    rest = pool.take(size - n)
    assert sorted(first + rest) == list(range(size)) and pool.free == 0
    pool.give(first)
    assert pool.free == n and pool.used == size - n
