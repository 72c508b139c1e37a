"""In-flight batching: requests join and leave the engine's batch at every step.

The scheduler decides; this runs its plans on an engine, draws each request's tokens and hands them out. Steps are taken
by one thread (`start`), or by the caller (`step`); `submit` and `cancel` may be called from any.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jet_export.errors import JetExportError
from jet_export.model.cache import PAGE, cdiv, pages_per_sequence
from jet_export.runtime.engine import Engine
from jet_export.runtime.metrics import Metrics
from jet_export.runtime.params import Chooser, Output, Params
from jet_export.runtime.runner import PoolSize, Runner, max_prefill_tokens
from jet_export.runtime.scheduler import Capacity, Plan, QueueFull, Request, Scheduler
from jet_export.runtime.tokenizer import ByteTokenizer, StopText, Tokenizer

log = logging.getLogger(__name__)
OnOutput = Callable[[Output], None]


@dataclass(frozen=True)
class Serving:
    """How much a BatchingEngine takes on. None: from the bundle's limits."""

    slots: int | None = None  # sequences at once, at most the bundle's max_batch_size
    kv_tokens: int | None = None  # tokens that full-attention KV has room for, all sequences together
    token_budget: int | None = None  # tokens a step, decode and prefill
    max_waiting: int = 256  # requests in the queue
    wait_timeout: float = 60.0  # seconds in the queue


def capacity(engine: Engine, serving: Serving) -> Capacity:
    """What an engine has to give out. Raises JetExportError where `serving` asks for more than its limits."""
    limits = engine.limits
    slots = limits.max_batch_size if serving.slots is None else serving.slots
    if not 1 <= slots <= limits.max_batch_size:
        raise JetExportError(f"{slots} sequences at once; the bundle's max_batch_size is {limits.max_batch_size}.")
    most = max(slots, max_prefill_tokens(limits.max_batch_size, limits.prefill_chunk))
    usual = 512 if engine.device.type == "cpu" else 2048
    budget = min(most, max(slots, usual)) if serving.token_budget is None else serving.token_budget
    if budget > most:
        raise JetExportError(f"token_budget {budget} is more than the {most} tokens that the bundle runs at once.")
    chunk = min(limits.prefill_chunk, budget)
    pages, ring = pages_per_sequence(engine.config, limits.max_seq_len, chunk)
    total = slots * pages if serving.kv_tokens is None else cdiv(serving.kv_tokens, PAGE)
    if total < 1:
        raise JetExportError(f"kv_tokens is {serving.kv_tokens}.", "It must be at least 1.")
    return Capacity(
        slots, total, min(total, slots * ring), PAGE, ring, limits.max_seq_len, chunk, budget,
        serving.max_waiting, serving.wait_timeout,
    )  # fmt: skip


class Sequence:
    """A request, its tokens and whom it reports to."""

    def __init__(self, request: Request, prompt: list[int], params: Params, text: StopText, tell: OnOutput) -> None:
        self.request, self.prompt, self.params = request, prompt, params
        self.text, self.tell = text, tell
        self.chooser: Chooser  # from the first step on
        self.tokens: list[int] = []
        self.first_at = 0.0  # time of the first token
        self.finish_reason: str | None = None


class BatchingEngine:
    """See the module. The pools have `capacity` rows: pages are shared, not set aside a slot."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | ByteTokenizer,
        eos: int,
        serving: Serving | None = None,
        cuda_graphs: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        c = capacity(engine, serving or Serving())
        table, _ = pages_per_sequence(engine.config, c.max_seq_len, c.prefill_chunk)
        pools = PoolSize(c.slots, c.pages, c.window_pages, table, c.ring_pages)
        self.engine, self.tokenizer, self.eos, self.clock = engine, tokenizer, eos, clock
        self.runner = Runner(engine, cuda_graphs, pools)
        self.scheduler = Scheduler(c)
        self.metrics = Metrics()
        self.sequences: dict[Request, Sequence] = {}
        self.lock = threading.RLock()
        self.work = threading.Condition(self.lock)
        self.thread: threading.Thread | None = None
        self.stopping = False

    def submit(self, prompt: list[int], params: Params, tell: OnOutput) -> Sequence:
        """Queue a prompt; `tell` gets each Output, in order, in the stepping thread, and must not block.

        Raises JetExportError for ids outside the vocabulary and for what could never run, QueueFull where too many
        wait.
        """
        vocab = self.engine.config.vocab_size
        bad = next((t for t in (*prompt, *params.stop_ids) if not 0 <= t < vocab), None)
        if bad is not None:
            raise JetExportError(f"token {bad} is not in the vocabulary of {vocab}.")
        with self.lock:
            if self.stopping:
                raise QueueFull("The engine is shutting down.")
            self.scheduler.check(len(prompt), params.max_new_tokens)
            try:
                request = self.scheduler.submit(len(prompt), params.max_new_tokens, self.clock())
            except QueueFull:
                self.metrics.requests["refused"] += 1
                raise
            sequence = Sequence(request, list(prompt), params, StopText(self.tokenizer, params.stop), tell)
            self.sequences[request] = sequence
            self.work.notify()
            return sequence

    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
        """End a request now: its slot and pages are free when this returns. Nothing happens where it has ended."""
        with self.lock:
            self._end(sequence, Output(None, finish_reason=reason))

    def step(self) -> bool:
        """Run one step; False where there is nothing to run."""
        with self.lock:
            for request in self.scheduler.expire(self.clock()):
                self.cancel(self.sequences[request], "timeout")
            plan = self.scheduler.plan()
            step = self._collect(plan)
        if not plan.tokens:
            return False
        try:
            logits = self._run(step)
            chosen = self._choose(step.makers, logits)
        except Exception:
            log.exception("step failed; its requests end with an error")
            with self.lock:
                for sequence in step.everyone:
                    self._end(sequence, Output(None, finish_reason="error"))
            return True
        with self.lock:
            made = self.scheduler.advance(plan)
            now = self.clock()
            self.metrics.step(now, plan.tokens - len(plan.decode), len(made))
            for request in made:
                if request in self.sequences:  # else a listener has just cancelled it
                    row = step.makers.index(self.sequences[request])
                    self._report(self.sequences[request], chosen[row], logits[row], now)
        return True

    def _collect(self, plan: Plan) -> _Step:
        """What the plan feeds, taken under the lock: a cancellation meanwhile changes the requests."""
        step = _Step([], [], [], [], [], [], [])
        for request, first, n in plan.prefill:
            sequence = self.sequences[request]
            if first == 0:
                self.runner.assign(request.slot, request.pages, request.window_pages)
                # Made here: only the stepping thread may touch the device, which may be capturing a graph.
                vocab = self.engine.config.vocab_size
                sequence.chooser = Chooser(sequence.params, sequence.prompt, vocab, self.engine.device)
            step.prefill_slots.append(request.slot)
            step.prefill_tokens.append(sequence.prompt[first : first + n])
            if first + n == request.prompt_len:
                step.prefill_ends.append(len(step.prefill_slots) - 1)
                step.makers.append(sequence)
            step.everyone.append(sequence)
        for request in plan.decode:
            sequence = self.sequences[request]
            step.decode_slots.append(request.slot)
            step.decode_tokens.append(sequence.tokens[-1])
            step.makers.append(sequence)
            step.everyone.append(sequence)
        return step

    def _run(self, step: _Step) -> list[Tensor]:
        """Logits [vocab] of each sequence in `step.makers`."""
        rows: list[Tensor] = []
        if step.prefill_slots:
            logits = self.runner.prefill(step.prefill_slots, step.prefill_tokens)
            rows += [logits[i] for i in step.prefill_ends]
        if step.decode_slots:
            tokens = torch.tensor(step.decode_tokens, dtype=torch.int64, device=self.engine.device)
            rows += self.runner.decode(step.decode_slots, tokens).unbind(0)
        return rows

    def _choose(self, sequences: list[Sequence], logits: list[Tensor]) -> list[int]:
        """The next token of each; -1 where its distribution is not one (the model gave NaN)."""
        drawn = [
            x.argmax(-1, keepdim=True) if s.chooser.plain else self._draw(s, x)
            for s, x in zip(sequences, logits, strict=True)
        ]
        return torch.cat(drawn).tolist() if drawn else []

    def _draw(self, sequence: Sequence, logits: Tensor) -> Tensor:
        try:
            return sequence.chooser(logits)
        except RuntimeError:
            log.exception("sampling failed; the request ends with an error")
            return torch.full((1,), -1, dtype=torch.int64, device=logits.device)

    def _report(self, sequence: Sequence, token: int, logits: Tensor, now: float) -> None:
        """One more token: its text, and whether the request ends by it."""
        if token < 0:
            self._end(sequence, Output(None, finish_reason="error"))
            return
        sequence.tokens.append(token)
        if len(sequence.tokens) == 1:
            sequence.first_at = now
            self.metrics.ttft.observe(now - sequence.request.arrival)
        p = sequence.params
        if token in p.stop_ids or (token == self.eos and not p.ignore_eos):
            (text, _), stopped = sequence.text.flush(), True
        else:
            text, stopped = sequence.text.push(token)
        reason = "stop" if stopped else None
        if not stopped and len(sequence.tokens) == p.max_new_tokens:
            rest, stopped = sequence.text.flush()
            text, reason = text + rest, "stop" if stopped else "length"
        output = Output(token, text, sequence.chooser.logprob(logits, token), reason)
        if reason:
            self._end(sequence, output)
        else:
            self._tell(sequence, output)

    def _end(self, sequence: Sequence, last: Output) -> None:
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = last.finish_reason
        self.scheduler.finish(sequence.request)
        del self.sequences[sequence.request]
        self.metrics.requests[str(last.finish_reason)] += 1
        if len(sequence.tokens) > 1:
            seconds = self.clock() - sequence.first_at
            self.metrics.tpot.observe(seconds / (len(sequence.tokens) - 1))
        self._tell(sequence, last)

    def _tell(self, sequence: Sequence, output: Output) -> None:
        try:
            sequence.tell(output)
        except Exception:  # whoever listened is gone
            log.exception("a request's listener failed; the request is cancelled")
            self._end(sequence, Output(None, finish_reason="cancelled"))

    def start(self) -> None:
        self.thread = threading.Thread(target=self._loop, name="jet-engine", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Cancel what is left, and take on no more."""
        with self.lock:
            self.stopping = True
            for sequence in list(self.sequences.values()):
                self.cancel(sequence)
            self.work.notify()

    def stop(self) -> None:
        """Close, and wait for the thread to end."""
        self.close()
        if self.thread:
            self.thread.join()
            self.thread = None

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive() and not self.stopping

    def _loop(self) -> None:
        while True:
            with self.lock:
                while not self.stopping and not self.sequences:
                    self.work.wait()
                if self.stopping:
                    return
            try:
                self.step()
            except Exception:
                log.exception("the engine failed; every request ends with an error")
                with self.lock:
                    for sequence in list(self.sequences.values()):
                        self.cancel(sequence, "error")

    def render_metrics(self) -> str:
        with self.lock:
            s, c = self.scheduler, self.scheduler.capacity
            gauges: dict[str, tuple[str, float]] = {
                "jet_requests_waiting": ("Requests in the queue.", len(s.waiting)),
                "jet_requests_running": ("Requests in the batch.", len(s.running)),
                "jet_slots_used": ("State slots in use.", s.slots.used),
                "jet_slots": ("State slots.", c.slots),
                "jet_kv_pages_used": ("KV pages in use, full attention.", s.pages.used),
                "jet_kv_pages": (f"KV pages of {c.page_size} tokens, full attention.", c.pages),
                "jet_window_pages_used": ("KV pages in use, sliding windows.", s.window_pages.used),
                "jet_window_pages": (f"KV pages of {c.page_size} tokens, sliding windows.", c.window_pages),
            }
            return self.metrics.render(self.clock(), gauges)


@dataclass
class _Step:
    """A plan as the runner takes it."""

    prefill_slots: list[int]
    prefill_tokens: list[list[int]]
    prefill_ends: list[int]  # rows of the prefill call that end a prompt
    decode_slots: list[int]
    decode_tokens: list[int]
    makers: list[Sequence]  # sequences that make a token: those of prefill_ends, then those of decode
    everyone: list[Sequence]
