"""For the scheduler's tests: a device that holds the tokens that states stand for, and capacities to draw from."""

from collections.abc import Sequence

from hypothesis import strategies as st

from jet_export.runtime.plan import Capacity, Request
from jet_export.runtime.prefix import Entry
from jet_export.runtime.scheduler import Scheduler


def submit(scheduler: Scheduler, prompt_len: int, max_new_tokens: int, now: float = 0.0, **options) -> Request:
    request = Request(prompt_len=prompt_len, max_new_tokens=max_new_tokens, arrival=now, **options)
    return scheduler.submit(request)


class FakeCopies:
    """memory.Copies over tokens."""

    def __init__(self, page_size: int = 16) -> None:
        self.page_size = page_size
        self.slots: dict[int, list[int]] = {}
        self.memory: dict[tuple[int, int], int] = {}  # (page, offset) -> token
        self.rows: dict[int, list[int]] = {}
        self.host: dict[int, list[int]] = {}
        self.told: list[list[int]] = []  # the texts of requests that have ended

    def read(self, pages: Sequence[int], n: int) -> list[int]:
        return [self.memory[pages[p // self.page_size], p % self.page_size] for p in range(n)]

    def slot_to_row(self, request: Request, row: int) -> None:
        self.rows[row] = list(self.slots[request.slot])
        assert len(self.rows[row]) == request.held

    def row_to_slot(self, row: int, request: Request, page: int | None) -> None:
        self.slots[request.slot] = list(self.rows[row])
        assert len(self.rows[row]) == request.held
        if page is not None:
            mine = request.pages[request.held // self.page_size]
            for offset in range(self.page_size):
                if (page, offset) in self.memory:
                    self.memory[mine, offset] = self.memory[page, offset]

    def row_to_host(self, entry: Entry, at: int) -> bool:
        self.host[at] = self.rows[entry.row]
        assert self.read(entry.pages, entry.end) == self.host[at]
        return True

    def slot_to_host(self, request: Request, at: int) -> bool:
        self.host[at] = list(self.slots[request.slot])
        assert self.read(request.pages, request.held) == self.host[at]
        return True

    def host_to_slot(self, at: int, request: Request) -> None:
        self.slots[request.slot] = list(self.host[at])
        assert len(self.host[at]) == request.held
        for p, token in enumerate(self.host[at]):
            self.memory[request.pages[p // self.page_size], p % self.page_size] = token


@st.composite
def capacities(draw, cached: bool = False) -> Capacity:
    slots, whole = draw(st.integers(1, 5)), draw(st.booleans())
    page = draw(st.sampled_from([1, 4] if cached else [1, 4, 16]))
    chunk = draw(st.sampled_from([2, 4, 8]) if cached else st.integers(1, 20))
    pages = draw(st.integers(2 if page == 16 else 60 // page, 90 // page))
    ring = draw(st.integers(1, 3))
    return Capacity(
        slots=slots,
        pages=pages,
        window_pages=draw(st.integers(ring, slots * ring)),
        page_size=page,
        ring_pages=ring,
        max_seq_len=pages * page,
        prefill_chunk=chunk,
        token_budget=slots + chunk * whole + draw(st.integers(0, 30)),
        max_waiting=draw(st.integers(0, 6)),
        wait_timeout=draw(st.sampled_from([5.0, 50.0])),
        whole_chunks=whole,
        mixed_prefill=None if whole else draw(st.none() | st.integers(1, 12)),
        prefix_interval=chunk * draw(st.integers(1, 3)) if cached else 0,
        prefix_rows=draw(st.integers(1, 5)) if cached else 0,
        row_bytes=50,
        page_bytes=7,
        host_bytes=draw(st.sampled_from([0, 300, 10**6])),
    )


def fits(c: Capacity, prompt: int, new: int) -> bool:
    pages, window = c.pages_for(prompt + new - 1)
    return prompt + new <= c.max_seq_len and pages <= c.pages and window <= c.window_pages
