"""In-flight batching: requests join and leave the engine's batch at every step.

The scheduler decides; this runs its plans on an engine, draws each request's tokens and hands them out. Steps are taken
by one thread (`start`), or by the caller (`step`); `submit` and `cancel` may be called from any.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.model.cache import pages_per_sequence
from jet_export.runtime.capacity import Serving, capacity
from jet_export.runtime.metrics import Metrics
from jet_export.runtime.params import Chooser, Output, Params
from jet_export.runtime.prefix import prefix_keys
from jet_export.runtime.runner import PoolSize, Runner
from jet_export.runtime.scheduler import Plan, QueueFull, Request, Scheduler
from jet_export.runtime.sequence import Keep, OnOutput, Sequence
from jet_export.runtime.snapshot import Snapshot, load_states, save_states
from jet_export.runtime.step import Flight, Step, fetch
from jet_export.runtime.tokenizer import ByteTokenizer, StopText, Tokenizer
from jet_export.utils.errors import JetExportError

log = logging.getLogger(__name__)


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
        ahead: bool | None = None,  # launch a step before the last one's tokens are read; default: on a GPU
    ) -> None:
        self.ahead = engine.device.type == "cuda" if ahead is None else ahead
        c = capacity(engine, serving or Serving())
        table, _ = pages_per_sequence(engine.config, c.max_seq_len, c.prefill_chunk)
        pools = PoolSize(
            slots=c.slots, pages=c.pages, window_pages=c.window_pages, table_pages=table, ring_pages=c.ring_pages
        )
        self.engine, self.tokenizer, self.eos, self.clock = engine, tokenizer, eos, clock
        self.runner = Runner(engine, cuda_graphs, pools, c.whole_chunks)
        self.scheduler = Scheduler(c)
        self.metrics = Metrics()
        self.sequences: dict[Request, Sequence] = {}
        self.lock = threading.RLock()
        self.work = threading.Condition(self.lock)
        self.thread: threading.Thread | None = None
        self.stopping = False
        self.flight: Flight | None = None  # launched ahead
        self.failure: Exception | None = None  # the last one

    def submit(
        self,
        prompt: list[int],
        params: Params,
        tell: OnOutput,
        start: Snapshot | None = None,
        keep: Keep | None = None,
        keep_logits: bool = False,
        text: bool = True,
    ) -> Sequence:
        """Queue a prompt; `tell` gets each Output, in order, in the stepping thread, and must not block.

        `start`: the prompt, which may then be empty, goes on from there. `keep` leaves a snapshot in
        `Sequence.snapshot`: of the "end", or of the "prompt", and then no token is made. `keep_logits` leaves each
        token's logits. Without `text`, Outputs have none.
        Raises JetExportError for ids outside the vocabulary and for what could never run, QueueFull where too many
        wait.
        """
        vocab = self.engine.config.vocab_size
        bad = next((t for t in (*prompt, *params.stop_ids) if not 0 <= t < vocab), None)
        if bad is not None:
            raise JetExportError(f"token {bad} is not in the vocabulary of {vocab}.")
        whole = [*(start.tokens if start else ()), *prompt]
        held = start.held if start else 0
        made = int(bool(held) and not prompt and len(whole) > held)  # the token that was made last is fed by decode
        with self.lock:
            if self.stopping:
                raise QueueFull("The engine is shutting down.")
            length, new = len(whole) - made, params.max_new_tokens + made
            self.scheduler.check(length, new)
            interval = self.scheduler.capacity.prefix_interval
            keys = prefix_keys(prompt, interval) if interval and not held else ()
            try:
                request = self.scheduler.submit(length, new, self.clock(), keys, held, made)
            except QueueFull:
                self.metrics.requests["refused"] += 1
                raise
            stop_text = StopText(self.tokenizer, params.stop) if text or params.stop else None
            sequence = Sequence(request, whole, params, stop_text, tell, start, keep, keep_logits)
            self.sequences[request] = sequence
            self.work.notify()
            return sequence

    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
        """End a request now: its slot and pages are free when this returns. Nothing happens where it has ended."""
        with self.lock:
            self._end(sequence, Output(None, finish_reason=reason))

    def step(self) -> bool:
        """Run one step; False where there is nothing to run.

        On a GPU the next decode step is launched before this one's tokens are looked at, so that the device does not
        wait for the host. A sequence that turns out to have ended was then decoded once for nothing: its slot's next
        owner comes later in the stream.
        """
        with self.lock:
            for request in self.scheduler.expire(self.clock()):
                self.cancel(self.sequences[request], "timeout")
        flight, self.flight = self.flight, None
        if flight is None:
            with self.lock:
                plan = self.scheduler.plan()
                step = self._collect(plan)
            if plan.empty:
                return False
            flight = self._launch(plan, step)
        if flight is not None:
            if self.ahead:
                self.flight = self._launch_ahead(flight)
            self._land(flight)
        return True

    def _launch(self, plan: Plan, step: Step) -> Flight | None:
        """Hand a step to the device; None where that fails, and its requests have ended with an error."""
        try:
            logits = self._run(step)
            drawn = self._choose(step.makers, logits)
            kept = logits.float().cpu() if any(s.keep_logits for s in step.makers) else None
            return Flight(plan, step, logits, drawn, fetch(drawn), kept)
        except Exception as e:
            self._failed(step, e)
            return None

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        """The decode step after `flight`, fed with its tokens on the device; None where there is none to foresee."""
        with self.lock:
            plan = self.scheduler.plan_ahead(flight.plan)
            goes_on = set(plan.decode)
            makers = [s for s in flight.step.makers if s.request in goes_on]
            if not makers or any(s.reads_logits for s in flight.step.makers):
                return None
            slots = [s.request.slot for s in makers]
        tokens = flight.drawn.clamp_min(0)  # -1: ends with an error
        if len(makers) < len(flight.step.makers):
            rows = [i for i, s in enumerate(flight.step.makers) if s.request in goes_on]
            tokens = tokens[torch.tensor(rows, device=tokens.device)]
        return self._launch(plan, Step(decode_slots=slots, foreseen=tokens, makers=makers, everyone=makers))

    def _land(self, flight: Flight) -> None:
        """Wait for a step's tokens and hand them out."""
        step = flight.step
        try:
            chosen = flight.tokens()
        except Exception as e:
            self._failed(step, e)
            return
        with self.lock:
            made = self.scheduler.advance(flight.plan)
            self._keep_prefixes(flight.plan)
            now = self.clock()
            self.metrics.step(now, flight.plan.tokens - len(flight.plan.decode), len(made))
            row_of = {s.request: i for i, s in enumerate(step.makers)}
            for request in made:
                if request in self.sequences:  # else a listener has just cancelled it
                    sequence, row = self.sequences[request], row_of[request]
                    if flight.kept is not None and sequence.keep_logits:
                        sequence.logits.append(flight.kept[row])
                    logits = flight.logits[row] if sequence.reads_logits else None
                    self._report(sequence, chosen[row], logits, now)

    def _failed(self, step: Step, e: Exception) -> None:
        log.error("step failed; its requests end with an error", exc_info=e)
        self.failure = e
        with self.lock:
            for sequence in step.everyone:
                self._end(sequence, Output(None, finish_reason="error"))

    def _collect(self, plan: Plan) -> Step:
        """What the plan feeds, taken under the lock: a cancellation meanwhile changes the requests."""
        step = Step()
        for request, first, n in plan.prefill:
            sequence = self._begun(request)
            step.prefill_slots.append(request.slot)
            step.prefill_tokens.append(sequence.prompt[first : first + n])
            if first + n == request.prompt_len:
                step.prefill_ends.append(len(step.prefill_slots) - 1)
                step.makers.append(sequence)
            step.everyone.append(sequence)
        for request in plan.drawn:
            sequence = self._begun(request)
            assert sequence.start is not None and sequence.start.logits is not None
            step.drawn.append(sequence.start.logits.to(self.engine.device))
            step.makers.append(sequence)
            step.everyone.append(sequence)
        for request in plan.decode:
            sequence = self._begun(request)
            step.decode_slots.append(request.slot)
            step.decode_tokens.append(sequence.last)
            step.makers.append(sequence)
            step.everyone.append(sequence)
        return step

    def _begun(self, request: Request) -> Sequence:
        """A request's sequence; before its first step, its slot is given its pages and the states it begins from.

        Done here since only the stepping thread may touch the device, which may be capturing a graph.
        """
        sequence = self.sequences[request]
        if sequence.chooser is None:
            self.runner.assign(request.slot, request.pages, request.window_pages)
            if sequence.start is not None and request.start:
                load_states(self.runner, request.slot, request.start, sequence.start.states)
            if request.entry is not None:
                load_states(self.runner, request.slot, request.entry.end, request.entry.snapshot)
            if request.keys:
                self.metrics.prefix(request.entry.end if request.entry else 0)
            request.entry = None
            vocab = self.engine.config.vocab_size
            sequence.chooser = Chooser(sequence.params, sequence.prompt, vocab, self.engine.device)
        return sequence

    def _keep_prefixes(self, plan: Plan) -> None:
        """Copy the states after a chunk that other prompts may begin with."""
        prefixes = self.scheduler.prefixes
        for request, _, _ in plan.prefill if prefixes else ():
            if self.scheduler.prefix_due(request):
                states = save_states(self.runner, request.slot, full_attention=False)
                self.scheduler.keep_prefix(request, states, sum(t.nbytes for t in states.values()))

    def _run(self, step: Step) -> Tensor:
        """Logits [len(step.makers), vocab]. They may lie in a buffer that the next step overwrites."""
        rows: list[Tensor] = []
        if step.prefill_slots:
            logits = self.runner.prefill(step.prefill_slots, step.prefill_tokens)
            if step.prefill_ends:
                whole = len(step.prefill_ends) == len(logits)
                rows.append(logits if whole else logits[torch.tensor(step.prefill_ends, device=logits.device)])
        if step.drawn:
            rows.append(torch.stack(step.drawn))
        if step.decode_slots:
            tokens = step.foreseen
            if tokens is None:
                tokens = torch.tensor(step.decode_tokens, dtype=torch.int64, device=self.engine.device)
            rows.append(self.runner.decode(step.decode_slots, tokens))
        if not rows:
            return torch.empty(0, self.engine.config.vocab_size, device=self.engine.device)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> Tensor:
        """The next token of each [n] int64; -1 where its distribution is not one (the model gave NaN)."""
        drawn = logits.argmax(-1)  # of all at once
        for i, sequence in enumerate(sequences):
            assert sequence.chooser is not None
            if not sequence.chooser.plain:
                drawn[i] = self._draw(sequence.chooser, logits[i])
        return drawn

    def _draw(self, chooser: Chooser, logits: Tensor) -> Tensor:
        try:
            return chooser(logits)[0]
        except RuntimeError as e:
            log.exception("sampling failed; the request ends with an error")
            self.failure = e
            return torch.tensor(-1, device=logits.device)

    def _report(self, sequence: Sequence, token: int, logits: Tensor | None, now: float) -> None:
        """One more token: its text, and whether the request ends by it. `logits`: where the sequence reads them."""
        if token < 0:
            self._end(sequence, Output(None, finish_reason="error"))
            return
        if sequence.keep == "prompt":
            assert logits is not None
            sequence.snapshot = self._snapshot(sequence, logits.clone())
            self._end(sequence, Output(None, finish_reason="length"))
            return
        sequence.tokens.append(token)
        if len(sequence.tokens) == 1:
            sequence.first_at = now
            self.metrics.ttft.observe(now - sequence.request.arrival)
        text, reason = self._text(sequence, token)
        assert sequence.chooser is not None
        logprob = None if logits is None else sequence.chooser.logprob(logits, token)
        output = Output(token, text, logprob, reason)
        if reason:
            if sequence.keep == "end":
                sequence.snapshot = self._snapshot(sequence)
            self._end(sequence, output)
        else:
            self._tell(sequence, output)

    def _text(self, sequence: Sequence, token: int) -> tuple[str, str | None]:
        """The text that one more token makes certain, and why the request ends by it, if it does."""
        p, stream = sequence.params, sequence.text
        full = len(sequence.tokens) == p.max_new_tokens
        if token in p.stop_ids or (token == self.eos and not p.ignore_eos):
            return stream.flush()[0] if stream else "", "stop"
        if stream is None:
            return "", "length" if full else None
        text, stopped = stream.push(token)
        if not stopped and full:
            rest, stopped = stream.flush()
            return text + rest, "stop" if stopped else "length"
        return text, "stop" if stopped else None

    def _snapshot(self, sequence: Sequence, logits: Tensor | None = None) -> Snapshot:
        """Of a sequence that still has its slot, in the stepping thread."""
        slot = sequence.request.slot
        tokens = (*sequence.prompt, *sequence.tokens)
        return Snapshot(tokens, self.runner.context_lens[slot], save_states(self.runner, slot), logits)

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
            if s.prefixes is not None:
                gauges["jet_prefix_cache_bytes"] = ("States and KV pages of shared prefixes.", s.prefixes.size)
                gauges["jet_prefix_cache_entries"] = ("Prefixes kept.", len(s.prefixes.entries))
            return self.metrics.render(self.clock(), gauges)
