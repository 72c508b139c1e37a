"""The scheduler step by step: budgets, pages, preemption, the prefix cache, refusals."""

import subprocess
import sys

import pytest
from helpers.fake_copies import FakeCopies, submit

from jet_export.runtime.plan import Capacity, Request, Status
from jet_export.runtime.prefix import Entry, page_hashes
from jet_export.runtime.scheduler import QueueFull, Scheduler
from jet_export.utils.errors import JetExportError


def capacity(**changes) -> Capacity:
    values = {
        "slots": 2,
        "pages": 8,
        "window_pages": 4,
        "page_size": 16,
        "ring_pages": 2,
        "max_seq_len": 128,
        "prefill_chunk": 32,
        "token_budget": 32,
        "max_waiting": 3,
        "wait_timeout": 10.0,
    }
    return Capacity(**{**values, **changes})


class Nowhere(FakeCopies):
    """Copies that are not looked at."""

    def slot_to_row(self, request: Request, row: int) -> None: ...

    def row_to_slot(self, row: int, request: Request, page: int | None) -> None: ...

    def row_to_host(self, entry: Entry, at: int) -> bool:
        return True

    def slot_to_host(self, request: Request, at: int) -> bool:
        return True

    def host_to_slot(self, at: int, request: Request) -> None: ...


def scheduler(**changes) -> Scheduler:
    return Scheduler(capacity(**changes), Nowhere())


def test_a_long_prompt_does_not_hold_up_decoding() -> None:
    s = scheduler(token_budget=8)
    short = submit(s, 4, 20)
    s.advance(s.plan())
    long = submit(s, 60, 4)
    while long.in_prompt:
        plan = s.plan()
        assert plan.decode == (short,) and plan.prefill[0][2] <= 7
        s.advance(plan)
    assert short.generated == 1 + 9  # 60 tokens at 7 a step


def test_mixed_prefill_bounds_a_prompt_only_beside_decode() -> None:
    s = scheduler(token_budget=32, mixed_prefill=8)
    short = submit(s, 4, 3)
    long = submit(s, 60, 4)
    lengths = []
    while long.in_prompt:
        plan = s.plan()
        lengths.append((len(plan.decode), sum(n for r, _, n in plan.prefill if r is long)))
        s.advance(plan)
        if short.status is Status.RUNNING and short.generated == 3:
            s.finish(short)
    assert lengths == [(0, 28), (1, 8), (1, 8), (0, 16)]


CACHE = {"prefix_interval": 32, "prefix_rows": 9, "row_bytes": 10, "page_bytes": 1, "window_pages": 8}


def run(s: Scheduler, text: list[int], new: int = 1) -> Request:
    """Run a prompt alone and cache its prefixes; `cached_tokens` of the result says what it found."""
    request = submit(s, len(text), new, text=text, hashes=page_hashes(text, 16))
    while request.status is not Status.ENDED:
        plan = s.plan()
        s.advance(plan)
        if plan.prefill and s.prefix_due(request):
            s.keep_prefix(request, text[: request.held])
        if request.launched:
            if s.turn_due(request):
                s.keep_prefix(request, [*text, *range(900, 900 + new)][: request.held])
            s.finish(request)
    return request


def test_a_prompt_starts_from_the_longest_prefix_of_any_length() -> None:
    s = scheduler(**CACHE)
    text = list(range(70))
    assert run(s, text, 3).cached_tokens == 0
    assert s.prefixes is not None
    assert [e.end for e in s.prefixes.entries.values()] == [32, 64, 70, 72]  # inside, at the end, and with the answer
    assert run(s, [*text, 7]).cached_tokens == 70
    assert run(s, [*text, 900, 901, 7]).cached_tokens == 72
    assert run(s, [*text[:66], 7, 7]).cached_tokens == 64
    assert run(s, text).cached_tokens == 64  # the logits of its last token are not cached
    assert run(s, [7, *text]).cached_tokens == 0
    assert s.memory.counts.hits == 4 and s.memory.counts.hit_tokens == 70 + 72 + 64 + 64


def test_the_second_prompt_that_begins_alike_caches_the_pages_they_share() -> None:
    """At 48 tokens, where no chunk ends; one of several that run at once does it, and the others run undivided."""
    s = scheduler(slots=4, pages=40, prefill_chunk=64, token_budget=400, **{**CACHE, "prefix_interval": 64})
    common = list(range(50))
    run(s, [*common, *[7] * 50])
    requests = []
    for i in range(3):
        text = [*common, *[80 + i] * 40]
        requests.append(submit(s, 90, 1, text=text, hashes=page_hashes(text, 16)))
    plan = s.plan()
    assert [r.cached_tokens for r in requests] == [0, 0, 0] and [n for _, _, n in plan.prefill] == [48, 64, 64]
    s.advance(plan)
    assert [s.prefix_due(r) for r in requests] == [True, True, True]
    s.keep_prefix(requests[0], common[:48])
    for r in requests:
        s.finish(r)
    assert s.prefixes is not None and not s.prefixes.claims
    assert run(s, [*common, 1, 2]).cached_tokens == 48


def test_deterministic_prefixes_are_whole_chunks_of_prompts() -> None:
    s = scheduler(**CACHE, whole_chunks=True, token_budget=40)
    text = list(range(70))
    run(s, text, 3)
    assert s.prefixes is not None
    assert [e.end for e in s.prefixes.entries.values()] == [32, 64]


def test_whole_pages_are_shared_and_the_last_is_copied() -> None:
    s = scheduler(**CACHE)
    text = list(range(40))
    run(s, text)
    assert s.prefixes is not None
    entry = list(s.prefixes.entries.values())[-1]
    request = submit(s, 50, 9, text=[*text, *range(10)], hashes=page_hashes([*text, *range(10)], 16))
    s.plan()
    assert request.held == entry.end == 40 and len(entry.pages) == 3
    assert request.pages[:2] == list(entry.pages[:2]) and request.pages[2] not in entry.pages


def test_the_least_recently_used_prefix_moves_to_the_host_and_comes_back() -> None:
    s = scheduler(**{**CACHE, "prefix_rows": 2}, host_bytes=12)
    a, b, c = ([i] * 20 for i in range(3))
    for text in (a, b, c):
        run(s, text)
    assert s.prefixes is not None
    assert [k[1][0] for k in s.prefixes.entries] == [1, 2] and [k[1][0] for k in s.prefixes.hosted] == [0]
    assert run(s, [*a, 9], 1).cached_tokens == 20 and s.memory.counts.host_hits == 1
    assert s.memory.counts.bytes_in == 12 and s.memory.host.used == 12


def test_earlier_turns_of_a_conversation_go_first_and_not_to_the_host() -> None:
    """Each turn starts from the end of the one before; a prefix that several have used stays."""
    s = scheduler(**{**CACHE, "prefix_rows": 5, "prefix_interval": 320}, host_bytes=1000)
    other, text = list(range(500, 520)), list(range(20))
    run(s, other)
    for turn in range(4):
        assert run(s, text, 3).cached_tokens == (20 + 7 * turn - 5 if turn else 0)
        text = [*text, 900, 901, *[turn] * 5]
    assert s.prefixes is not None and s.memory.counts.evictions == 4 and not s.prefixes.hosted
    assert run(s, [*other, 7]).cached_tokens == 20
    shared = list(range(700, 720))
    for i in range(3):
        run(s, [*shared, *[i] * i])
    entry = s.prefixes.entries[s.prefixes.key(shared, page_hashes(shared, 16))]
    assert entry.hits == 2 and not entry.superseded


def test_prefixes_give_way_to_requests_but_not_the_one_that_is_used() -> None:
    s = scheduler(**CACHE, pages=6)
    old, new = list(range(33)), list(range(50, 90))
    run(s, old)
    run(s, new)
    request = submit(s, 80, 8, text=[*old[:32], *range(48)], hashes=page_hashes([*old[:32], *range(48)], 16))
    s.plan()
    assert (request.status, request.held) == (Status.RUNNING, 32)


def test_alone_a_request_gets_every_page() -> None:
    """Though it would start from an entry whose last page it copies."""
    s = scheduler(**CACHE, pages=2)
    text = list(range(20))
    run(s, text)
    request = submit(s, 30, 2, text=[*text, *range(10)], hashes=page_hashes([*text, *range(10)], 16))
    s.plan()
    assert (request.status, request.held) == (Status.RUNNING, 0)


def test_the_youngest_gives_up_its_pages_and_comes_back_first() -> None:
    s = scheduler(slots=3, pages=6, window_pages=6, host_bytes=1000, row_bytes=10, page_bytes=1, token_budget=64)
    old, young = submit(s, 30, 50), submit(s, 20, 50)
    while old.held < 48:
        s.advance(s.plan())
    third = submit(s, 3, 3)
    plan = s.plan()  # the old one needs a fourth page, the young one has three
    assert plan.decode == (old,) and young.status is Status.WAITING and young.kept is not None
    assert list(s.waiting) == [young, third] and s.memory.counts.preemptions == 1
    held = young.held
    s.finish(old)
    plan = s.plan()
    assert plan.decode == (young,) and young.held == held == 38 and young.restored and s.memory.host.used == 0


@pytest.mark.parametrize("whole", [False, True])
def test_without_room_on_the_host_a_request_runs_its_tokens_again(whole: bool) -> None:
    """In deterministic mode it decodes them again, which gives the same bits; else all are prefilled."""
    s = scheduler(slots=2, pages=6, token_budget=64, whole_chunks=whole)
    old, young = submit(s, 30, 50), submit(s, 20, 50)
    while old.held < 48:
        s.advance(s.plan())
    held, generated = young.held, young.generated
    s.plan()
    s.finish(old)
    assert young.status is Status.WAITING and young.kept is None and held > 30
    while young.in_prompt:
        s.advance(s.plan())
    assert (young.held, young.generated) == ((20, 1) if whole else (held, generated))


def test_hashes_depend_on_all_tokens_before_them() -> None:
    a, b = page_hashes([1, 2, 3, 4, 5], 2), page_hashes([0, 2, 3, 4, 5], 2)
    assert len(a) == 2 and a[0] != b[0] and a[1] != b[1]
    assert page_hashes([1, 2, 3, 4, 9], 2) == a and page_hashes([1, 2, 3, 5], 2)[0] == a[0]
    assert page_hashes([1, 2, 3, 4, 9, 9], 2, a) == (*a, page_hashes([1, 2, 3, 4, 9, 9], 2)[2])


def test_a_small_request_does_not_overtake_one_that_waits_for_memory() -> None:
    s = scheduler(slots=3)
    big, bigger, small = submit(s, 70, 10), submit(s, 70, 10), submit(s, 1, 1)
    s.plan()
    assert [r.status for r in (big, bigger, small)] == [Status.RUNNING, Status.WAITING, Status.WAITING]
    s.finish(big)
    s.plan()
    assert [bigger.status, small.status] == [Status.RUNNING, Status.RUNNING]


def test_the_lower_priority_goes_first() -> None:
    s = scheduler(slots=1, max_waiting=9)
    running = submit(s, 4, 3)
    s.advance(s.plan())
    order = [submit(s, 4, 1, priority=p) for p in (3, 0, -1, 0, 3)]
    assert list(s.waiting) == [order[i] for i in (2, 1, 3, 0, 4)]
    assert s.plan().decode == (running,)  # whoever runs goes on while there is room
    s.finish(running)
    assert s.plan().prefill[0][0] is order[2]


def test_the_higher_priority_is_preempted_first_and_then_the_younger() -> None:
    s = scheduler(slots=3, pages=6, window_pages=6, token_budget=64)
    first, second, third = (submit(s, 12, 40, priority=p) for p in (5, 0, 0))
    s.advance(s.plan())
    while not first.preemptions:
        s.advance(s.plan())
    assert s.running == [second, third] and list(s.waiting) == [first]
    while not third.preemptions:
        s.advance(s.plan())
    assert s.running == [second] and list(s.waiting) == [third, first]


def test_a_timeout_does_not_depend_on_the_place_in_the_queue() -> None:
    s = scheduler(slots=1)
    submit(s, 4, 9)
    s.plan()
    late, young = submit(s, 4, 9, priority=2), submit(s, 4, 9, now=8.0, priority=1)
    assert s.expire(11.0) == [late] and list(s.waiting) == [young]


def test_a_full_queue_refuses_and_forgets() -> None:
    s = scheduler(slots=1, max_waiting=1)
    submit(s, 1, 1)
    submit(s, 1, 1)
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        submit(s, 1, 1)
    s.plan()
    assert len(s.waiting) == 1
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        submit(s, 1, 1)


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [(0, 1, "empty"), (1, 0, "at least 1"), (100, 29, "exceed max_seq_len 128"), (70, 2, "need 5 KV pages of 16")],
)
def test_what_can_never_run_is_refused(prompt: int, new: int, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        submit(scheduler(pages=4), prompt, new)


@pytest.mark.parametrize(
    ("field", "value"),
    [("slots", 0), ("token_budget", 1), ("wait_timeout", float("nan")), ("prefix_interval", 40), ("mixed_prefill", 0)],
)
def test_bad_capacities_are_refused(field: str, value: float) -> None:
    with pytest.raises(JetExportError):
        capacity(**{field: value})


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys; import jet_export.runtime.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
