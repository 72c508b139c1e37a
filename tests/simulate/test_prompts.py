"""Prompts that are not written out have equal tokens and equal hashes exactly where the load says so."""

from jet_export.runtime.prefix import page_hashes
from jet_export.simulate.load import Arrival
from jet_export.simulate.prompts import Prompts


def test_a_turn_begins_with_the_turns_before_and_with_nothing_else() -> None:
    prompts = Prompts(16)
    first, other, second = (prompts.of(Arrival(0, n, 20, s)) for n, s in ((50, "a"), (50, "b"), (100, "a")))
    alone, again = prompts.of(Arrival(0, 50, 20)), prompts.of(Arrival(0, 50, 20))
    assert list(first.tokens) == list(second.tokens[:70]) and len(first.hashes) == 4
    assert first.hashes == second.hashes[:4] and len(second.hashes) == 7
    different = [first, other, alone, again]
    for a in different:
        for b in different:
            assert a is b or not (set(a.tokens) & set(b.tokens) or set(a.hashes) & set(b.hashes))


def test_blocks_are_equal_where_their_ids_are() -> None:
    prompts = Prompts(128)
    one, two = (prompts.of(Arrival(0, 1200, 300, "", (4, 5, i))) for i in (6, 7))
    assert len(one.tokens) == 1500 and len(one.hashes) == 11
    shared = [a == b for a, b in zip(one.tokens, two.tokens, strict=True)]
    assert shared == [i < 1024 for i in range(1500)]
    assert [a == b for a, b in zip(one.hashes, two.hashes, strict=True)] == [page < 8 for page in range(11)]
    assert list(one.tokens[:1300][1190:1210]) == list(one.tokens)[1190:1210]
    # As the scheduler's cache sees them: equal hashes of its own for equal tokens.
    assert (
        page_hashes(range(0), 128, one.hashes) == ()
        and page_hashes(one.tokens[:1024], 128, one.hashes) == one.hashes[:8]
    )
