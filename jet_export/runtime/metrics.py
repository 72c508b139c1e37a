"""Counters of a running engine, and their Prometheus text form."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
RATE_WINDOW = 10.0  # seconds that tokens/s is the mean of


class Histogram:
    """Counts at or below each bound, as Prometheus has them."""

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
        return [*buckets, f'{name}_bucket{{le="+Inf"}} {self.total}', f"{name}_sum {self.sum:.6f}",
                f"{name}_count {self.total}"]  # fmt: skip


@dataclass
class Metrics:
    requests: Counter[str] = field(default_factory=Counter)  # by finish reason, "refused" among them
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    prefix_queries: int = 0  # requests with a prompt long enough for the prefix cache
    prefix_hits: int = 0
    prefix_tokens: int = 0  # prompt tokens that were not run, thanks to it
    ttft: Histogram = field(default_factory=Histogram)  # seconds from arrival to the first token
    tpot: Histogram = field(default_factory=Histogram)  # seconds a token after the first, a request's mean
    recent: deque[tuple[float, int]] = field(default_factory=deque)  # (time, tokens made) of the last steps

    def step(self, now: float, prompt_tokens: int, tokens: int) -> None:
        self.steps += 1
        self.prompt_tokens += prompt_tokens
        self.tokens += tokens
        self.recent.append((now, tokens))
        self._forget(now)

    def prefix(self, tokens: int) -> None:
        """A request began with so many tokens from the prefix cache."""
        self.prefix_queries += 1
        self.prefix_hits += tokens > 0
        self.prefix_tokens += tokens

    def rate(self, now: float) -> float:
        self._forget(now)
        return sum(n for _, n in self.recent) / RATE_WINDOW

    def _forget(self, now: float) -> None:
        while self.recent and self.recent[0][0] < now - RATE_WINDOW:
            self.recent.popleft()

    def render(self, now: float, gauges: dict[str, tuple[str, float]]) -> str:
        """`gauges`: name -> (help, value)."""
        out: list[str] = []

        def family(name: str, kind: str, text: str, lines: list[str]) -> None:
            out.extend([f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines])

        reasons = ("stop", "length", "cancelled", "timeout", "error", "refused")
        counts = [f'jet_requests_total{{reason="{r}"}} {self.requests[r]}' for r in reasons]
        family("jet_requests_total", "counter", "Requests that have ended.", counts)
        for name, text, value in (
            ("jet_prompt_tokens_total", "Prompt tokens run.", self.prompt_tokens),
            ("jet_tokens_total", "Tokens made.", self.tokens),
            ("jet_steps_total", "Steps of the engine.", self.steps),
            ("jet_prefix_queries_total", "Prompts long enough for the prefix cache.", self.prefix_queries),
            ("jet_prefix_hits_total", "Of these, found at least in part.", self.prefix_hits),
            ("jet_prefix_tokens_total", "Prompt tokens not run, thanks to the prefix cache.", self.prefix_tokens),
        ):
            family(name, "counter", text, [f"{name} {value}"])
        rate = ("jet_tokens_per_second", (f"Tokens made a second, over {RATE_WINDOW:g} s.", self.rate(now)))
        for name, (text, number) in (rate, *gauges.items()):
            family(name, "gauge", text, [f"{name} {number:g}"])
        for name, text, histogram in (
            ("jet_ttft_seconds", "From arrival to the first token.", self.ttft),
            ("jet_tpot_seconds", "A token after the first, the mean of each request.", self.tpot),
        ):
            family(name, "histogram", text, histogram.lines(name))
        return "\n".join(out) + "\n"
