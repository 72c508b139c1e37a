"""Counters and gauges of a running engine, and their Prometheus text format."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from jet_export.runtime.acceptance import DraftCounts
from jet_export.runtime.memory import MemoryCounts
from jet_export.runtime.scheduler import Scheduler

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
RATE_WINDOW = 10.0  # seconds over which tokens/s is averaged


class Histogram:
    """Cumulative counts, as in Prometheus: of the values at or below each bound."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds, self.counts = bounds, [0] * len(bounds)
        self.total, self.sum = 0, 0.0

    def observe(self, value: float) -> None:
        self.total += 1
        self.sum += value
        for i, bound in enumerate(self.bounds):
            self.counts[i] += value <= bound

    def lines(self, name: str) -> list[str]:
        buckets = [f'{name}_bucket{{le="{b:g}"}} {n}' for b, n in zip(self.bounds, self.counts, strict=True)]
        return [
            *buckets,
            f'{name}_bucket{{le="+Inf"}} {self.total}',
            f"{name}_sum {self.sum:.6f}",
            f"{name}_count {self.total}",
        ]


@dataclass(frozen=True, kw_only=True)
class Gauges:
    """The scheduler at one moment."""

    requests_waiting: int
    requests_running: int
    slots_used: int
    slots: int
    pages_used: int
    pages: int
    window_pages_used: int
    window_pages: int
    page_size: int
    requests_preempted: int  # of those waiting
    host_bytes_used: int
    host_bytes: int
    prefix_cache_bytes: int | None = None  # None: there is no prefix cache
    prefix_cache_entries: int | None = None
    prefix_cache_host_entries: int | None = None

    @classmethod
    def of(cls, scheduler: Scheduler) -> Gauges:
        s, prefixes, host = scheduler, scheduler.prefixes, scheduler.memory.host
        return cls(
            requests_waiting=len(s.waiting),
            requests_running=len(s.running),
            slots_used=s.slots.used,
            slots=s.slots.size,
            pages_used=s.memory.requests_pages,
            pages=s.pages.size,
            window_pages_used=s.window_pages.used,
            window_pages=s.window_pages.size,
            page_size=s.capacity.page_size,
            requests_preempted=len(s.waiting) - s.unstarted,
            host_bytes_used=host.used,
            host_bytes=host.size,
            prefix_cache_bytes=s.memory.prefix_bytes if prefixes else None,
            prefix_cache_entries=len(prefixes.entries) if prefixes else None,
            prefix_cache_host_entries=len(prefixes.hosted) if prefixes else None,
        )

    def families(self) -> list[tuple[str, str, float]]:
        """(name, help, value) of each gauge."""
        pages = f"KV pages of {self.page_size} tokens"
        gauges: list[tuple[str, str, float | None]] = [
            ("jet_requests_waiting", "Requests in the queue.", self.requests_waiting),
            ("jet_requests_running", "Requests in the batch.", self.requests_running),
            ("jet_slots_used", "State slots in use.", self.slots_used),
            ("jet_slots", "State slots.", self.slots),
            ("jet_kv_pages_used", "KV pages of requests, full attention.", self.pages_used),
            ("jet_kv_pages", f"{pages}, full attention.", self.pages),
            ("jet_window_pages_used", "KV pages in use, sliding windows.", self.window_pages_used),
            ("jet_window_pages", f"{pages}, sliding windows.", self.window_pages),
            ("jet_requests_preempted", "Requests in the queue that have run before.", self.requests_preempted),
            ("jet_host_cache_bytes_used", "States of requests and prefixes on the host.", self.host_bytes_used),
            ("jet_host_cache_bytes", "Host memory for states.", self.host_bytes),
            ("jet_prefix_cache_bytes", "States and KV pages of cached prefixes, device.", self.prefix_cache_bytes),
            ("jet_prefix_cache_entries", "Prefixes in the cache on the device.", self.prefix_cache_entries),
            ("jet_prefix_cache_host_entries", "Prefixes in the cache on the host.", self.prefix_cache_host_entries),
        ]
        return [(name, text, value) for name, text, value in gauges if value is not None]


@dataclass
class Metrics:
    requests: Counter[str] = field(default_factory=Counter)  # by finish reason, or "refused"
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    memory: MemoryCounts = field(default_factory=MemoryCounts)
    drafts: DraftCounts | None = None  # None: tokens are not drafted
    ttft: Histogram = field(default_factory=Histogram)  # seconds from arrival to the first token
    tpot: Histogram = field(default_factory=Histogram)  # seconds per token after the first, the mean of each request
    recent: deque[tuple[float, int]] = field(default_factory=deque)  # (time, tokens generated) of the last steps

    def step(self, now: float, *, prompt_tokens: int, tokens: int) -> None:
        self.steps += 1
        self.prompt_tokens += prompt_tokens
        self.tokens += tokens
        self.recent.append((now, tokens))
        self._forget(now)

    @property
    def prefix_hits(self) -> int:
        return self.memory.hits + self.memory.host_hits

    @property
    def prefix_tokens(self) -> int:
        """Prompt tokens skipped thanks to the prefix cache."""
        return self.memory.hit_tokens

    def rate(self, now: float) -> float:
        self._forget(now)
        return sum(n for _, n in self.recent) / RATE_WINDOW

    def _forget(self, now: float) -> None:
        while self.recent and self.recent[0][0] < now - RATE_WINDOW:
            self.recent.popleft()

    def render(self, now: float, gauges: Gauges) -> str:
        """Prometheus' text format."""
        reasons = ("stop", "length", "cancelled", "timeout", "error", "refused")
        counts = [f'jet_requests_total{{reason="{r}"}} {self.requests[r]}' for r in reasons]
        lines = _family("jet_requests_total", "counter", "Requests that have ended.", counts)
        for name, text, count in (
            ("jet_prompt_tokens_total", "Prompt tokens run.", self.prompt_tokens),
            ("jet_tokens_total", "Tokens generated.", self.tokens),
            ("jet_steps_total", "Steps of the engine.", self.steps),
            ("jet_prefix_queries_total", "Prompts long enough for the prefix cache.", self.memory.queries),
            ("jet_prefix_hits_total", "Prompts found in the prefix cache, at least in part.", self.prefix_hits),
            ("jet_prefix_host_hits_total", "Of these, found in host memory.", self.memory.host_hits),
            ("jet_prefix_tokens_total", "Prompt tokens skipped thanks to the prefix cache.", self.prefix_tokens),
            ("jet_prefix_evictions_total", "Prefixes evicted from the device.", self.memory.evictions),
            ("jet_preemptions_total", "Requests preempted for others' KV pages.", self.memory.preemptions),
            ("jet_swapped_out_bytes_total", "States moved to host memory.", self.memory.bytes_out),
            ("jet_swapped_in_bytes_total", "States moved back from it.", self.memory.bytes_in),
        ):
            lines += _family(name, "counter", text, [f"{name} {count}"])
        if self.drafts is not None:
            lines += self.drafts_lines(self.drafts)
        rate = ("jet_tokens_per_second", f"Tokens generated per second, over {RATE_WINDOW:g} s.", self.rate(now))
        for name, text, value in (rate, *gauges.families()):
            lines += _family(name, "gauge", text, [f"{name} {value:g}"])
        for name, text, histogram in (
            ("jet_ttft_seconds", "From arrival to the first token.", self.ttft),
            ("jet_tpot_seconds", "Time per token after the first, the mean of each request.", self.tpot),
        ):
            lines += _family(name, "histogram", text, histogram.lines(name))
        return "\n".join(lines) + "\n"

    @staticmethod
    def drafts_lines(drafts: DraftCounts) -> list[str]:
        drafted, accepted = "jet_drafted_tokens_total", "jet_accepted_tokens_total"
        by_position = "jet_drafted_position_total", "jet_accepted_position_total"
        lines = _family(drafted, "counter", "Tokens drafted and verified.", [f"{drafted} {sum(drafts.drafted)}"])
        lines += _family(accepted, "counter", "Of these, accepted.", [f"{accepted} {sum(drafts.accepted)}"])
        for name, text, counts in zip(
            by_position,
            ("Drafted tokens, by the position in the draft.", "Accepted tokens, by the position in the draft."),
            (drafts.drafted, drafts.accepted),
            strict=True,
        ):
            samples = [f'{name}{{position="{i}"}} {n}' for i, n in enumerate(counts, 1)]
            lines += _family(name, "counter", text, samples)
        return lines


def _family(name: str, kind: str, text: str, samples: list[str]) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]
