"""What the scheduler plans with: the capacity, the requests, and the plan of a step. Plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from jet_export.utils.errors import JetExportError


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The resources that requests share. Lengths are in tokens."""

    slots: int  # sequences at once
    pages: int  # KV pages of full-attention layers
    window_pages: int  # KV pages of sliding-window layers
    page_size: int
    ring_pages: int  # pages in the ring of one sequence's sliding windows
    max_seq_len: int
    prefill_chunk: int  # at most this much of one prompt per step
    token_budget: int  # per step: decode and prefill of all sequences
    max_waiting: int  # requests in the queue
    wait_timeout: float  # seconds in the queue
    whole_chunks: bool = False  # deterministic: a prompt's chunks end at multiples of prefill_chunk, whatever else runs
    mixed_prefill: int | None = None  # prompt tokens of a step that also decodes; None: what the budget leaves
    prefix_interval: int = 0  # tokens between prefix cache entries inside a prompt; 0: no cache
    prefix_rows: int = 0  # entries of the prefix cache on the device
    row_bytes: int = 0  # of a sequence's states other than KV pages: a row of the prefix cache
    page_bytes: int = 0  # of one KV page, over all full-attention layers
    host_bytes: int = 0  # host memory for preempted requests and evicted prefixes

    def __post_init__(self) -> None:
        for name in ("slots", "page_size", "ring_pages", "max_seq_len", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise JetExportError(f"{name} is {getattr(self, name)}.", "It must be at least 1.")
        if self.token_budget < self.slots:  # otherwise decode could starve a prompt
            raise JetExportError(
                f"token_budget {self.token_budget} is less than the {self.slots} sequences that run at once.",
                f"Set it to {self.slots} or more.",
            )
        if self.whole_chunks and self.token_budget < self.slots - 1 + self.prefill_chunk:
            raise JetExportError(
                f"token_budget {self.token_budget} has no room for a chunk of {self.prefill_chunk} tokens beside "
                f"{self.slots - 1} sequences.",
                f"Set it to {self.slots - 1 + self.prefill_chunk} or more.",
            )
        if self.prefix_interval % self.prefill_chunk:
            raise JetExportError(f"prefix_interval {self.prefix_interval} is not a whole number of chunks.")
        if self.mixed_prefill is not None and (self.whole_chunks or self.mixed_prefill < 1):
            raise JetExportError(
                f"mixed_prefill is {self.mixed_prefill}.", "It must be at least 1, and goes without whole chunks."
            )
        if self.max_waiting < 0 or not self.wait_timeout > 0:
            raise JetExportError("The queue needs max_waiting >= 0 and wait_timeout > 0.")

    def pages_for(self, tokens: int) -> tuple[int, int]:
        """(pages, window pages) of a sequence of this length."""
        pages = -(-tokens // self.page_size)
        return pages, min(pages, self.ring_pages)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that can run, alone."""
        return min(self.max_seq_len, self.pages * self.page_size)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of everything that a sequence holds after `tokens`."""
        return self.row_bytes + self.pages_for(tokens)[0] * self.page_bytes


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False, kw_only=True, slots=True)
class Request:
    """A request as the scheduler sees it: lengths, and the slot and pages it owns while it runs.

    `held` tokens are in its states: those of the prompt first, then all generated ones but the last. A session's
    request has `start` prompt tokens held at admission; `generated` is 1 where the token after a fully held prompt
    has been sampled but not yet decoded. A request that is preempted waits again, with a copy of its states on the
    host at `kept`, or to run its tokens again: then the first `prefill_len` of them are prefilled.
    """

    prompt_len: int
    max_new_tokens: int
    arrival: float  # seconds, on the caller's clock
    priority: int = 0  # the lower goes first
    start: int = 0
    generated: int = 0
    text: Sequence[int] | None = None  # the prompt, if the prefix cache may hold it
    hashes: tuple[bytes, ...] = ()  # of its whole pages, see prefix.py
    status: Status = Status.WAITING
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    window_pages: list[int] = field(default_factory=list)
    held: int = 0
    kept: int | None = None  # first byte of its states in the host's memory, while it waits
    restored: bool = False  # the states of the `held` tokens are in the slot: from the prefix cache or from `kept`
    prepared: bool = False  # the runner and the sampler know the slot, its pages and its states
    entry: tuple[bytes, tuple[int, ...]] | None = None  # key of the prefix it started from or cached last
    branch: int = 0  # the prefill of its prompt stops here too: another prompt has begun with the same pages
    leads: bool = False  # others with the same prompt start from its states
    leader: Request | None = None  # the one whose states this one starts from
    fork_at: int = 0  # where those that it leads start: the prefill of its prompt stops here too
    preemptions: int = 0
    cached_tokens: int | None = None  # prompt tokens that the prefix cache had, once admitted
    rank: tuple[int, int] = (0, 0)  # its place: its priority, and its number among all that were submitted
    prefill_len: int = field(init=False)
    begun: int = field(init=False)  # `generated` at submission

    def __post_init__(self) -> None:
        self.prefill_len, self.begun = self.prompt_len, self.generated

    @property
    def max_held(self) -> int:
        """The last generated token is returned but never fed back."""
        return self.prompt_len + self.max_new_tokens - 1

    @property
    def awaits_leader(self) -> bool:
        """Whether the states to start from are still to come."""
        leader = self.leader
        return leader is not None and leader.status is not Status.ENDED and leader.held < leader.fork_at

    @property
    def in_prompt(self) -> bool:
        return self.held < self.prefill_len

    @property
    def launched(self) -> bool:
        """Whether all its tokens have been launched: it only waits for the last one."""
        return self.generated >= self.max_new_tokens

    @property
    def length(self) -> int:
        """Tokens to have pages for at admission: those to prefill, and one to decode if it has sampled any."""
        return min(max(self.prefill_len + (self.generated > 0), self.held + 1), self.max_held)

    def restart(self, replay: bool) -> None:
        """Its states are lost: prefill its tokens again. `replay`: generate them again, which gives the same bits."""
        self.restored, self.held = False, self.start
        if replay:
            self.generated = self.begun
        self.prefill_len = self.prompt_len + max(self.generated - 1, 0)


@dataclass(frozen=True)
class Plan:
    """One step: prompt chunks as (request, first token, number of tokens), and the requests that decode one token.

    `resumed` requests start with the whole prompt held; their first token is sampled from the logits saved with it.
    `grown`: (request, pages that it has been given since it started), of those that decode.
    """

    prefill: tuple[tuple[Request, int, int], ...] = ()
    decode: tuple[Request, ...] = ()
    resumed: tuple[Request, ...] = ()
    grown: tuple[tuple[Request, int], ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.prefill or self.decode or self.resumed)

    @property
    def prefill_tokens(self) -> int:
        return sum(n for _, _, n in self.prefill)

    @property
    def tokens(self) -> int:
        return len(self.decode) + self.prefill_tokens
