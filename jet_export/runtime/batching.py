"""Continuous batching: requests join and leave the engine's batch at every step.

The scheduler plans the steps, the executor runs them, and delivery.py hands out the tokens. Steps are taken by one
thread (`start`) or by the caller (`step`); `submit` and `cancel` may be called from any thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from jet_export.backends.base import Engine
from jet_export.runtime.acceptance import DraftCounts
from jet_export.runtime.capacity import Serving, capacity, pacing, pool_size
from jet_export.runtime.copies import StateCopies
from jet_export.runtime.delivery import Delivery
from jet_export.runtime.draft_model import draft_model
from jet_export.runtime.drafts import Proposer, speculation
from jet_export.runtime.engine_thread import EngineThread
from jet_export.runtime.executor import Executor
from jet_export.runtime.grammar_compile import GrammarCompiler
from jet_export.runtime.grammar_masks import accept
from jet_export.runtime.metrics import Gauges, Metrics
from jet_export.runtime.mtp_draft import MtpDraft, mtp_draft
from jet_export.runtime.params import Output, Params, check_tokens, end_tokens
from jet_export.runtime.plan import Plan, Request
from jet_export.runtime.prefix import page_hashes
from jet_export.runtime.runner import Runner
from jet_export.runtime.scheduler import QueueFull, Scheduler
from jet_export.runtime.sequence import Keep, OnOutput, RunningSequence
from jet_export.runtime.snapshot import EMPTY, Snapshot
from jet_export.runtime.step import InFlightStep, StepInputs
from jet_export.runtime.tokenizer import ByteTokenizer, StopText, Tokenizer


class BatchingEngine(EngineThread):
    """Runs requests on an engine. Its sequences share the KV pages of `capacity`.

    `overlap` (overlap scheduling): launch the next step before the tokens of this one are read; by default on a GPU.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | ByteTokenizer,
        eos: int | Sequence[int],
        serving: Serving | None = None,
        *,
        cuda_graphs: bool = True,
        overlap: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        proposer: Proposer | None = None,
    ) -> None:
        """`proposer`: makes the drafts; by default as `serving` says."""
        super().__init__()
        self.engine, self.tokenizer, self.eos, self.clock = engine, tokenizer, end_tokens(eos), clock
        self.overlap = engine.device.type == "cuda" if overlap is None else overlap
        serving = serving or Serving()
        proposer = proposer or draft_model(engine, tokenizer, serving, cuda_graphs) or mtp_draft(engine, serving)
        self.speculation = speculation(engine, serving, proposer, clock)
        c, self.pacing = capacity(engine, serving), pacing(engine, serving)
        self.runner = Runner(engine, cuda_graphs, pools=pool_size(c), deterministic=c.whole_chunks)
        self.mtp = proposer if isinstance(proposer, MtpDraft) else None
        if self.mtp:
            self.mtp.calls.runner = self.runner
        copies = StateCopies(engine, self.runner, rows=c.prefix_rows, host_bytes=c.host_bytes)
        self.scheduler = Scheduler(c, copies, self.pacing)
        self.metrics = Metrics(memory=self.scheduler.memory.counts)
        self.executor = Executor(engine, self.runner, self.eos, engine.rollback if self.speculation else 0)
        self.delivery = Delivery(self.executor, self.scheduler, self.metrics, clock)
        if self.speculation:
            self.metrics.drafts = DraftCounts()
            self.delivery.on_end = self.speculation.end
            self.executor.on_begin = self.speculation.begin
        self.sequences = self.delivery.sequences
        self.grammars = GrammarCompiler(tokenizer, engine.config.vocab_size, self.eos)
        self.next_step: InFlightStep | None = None  # launched while the step before it still ran
        self.finished_at, self.rested = -math.inf, True  # the step before, on the engine's clock; nothing has run since
        self.delivering = False  # the outputs of a step are out; `after_step` follows
        self.after_step: Callable[[], None] = lambda: None

    @property
    def failure(self) -> Exception | None:
        """Why the last request that ended with an error did so."""
        return self.executor.failure

    def submit(
        self,
        prompt: list[int],
        params: Params,
        on_output: OnOutput,
        *,
        start: Snapshot | None = None,
        keep: Keep | None = None,
        keep_logits: bool = False,
        text: bool = True,
        leader: RunningSequence | None = None,
        choice: int = 0,
    ) -> RunningSequence:
        """Queue a prompt. The stepping thread calls `on_output` with each Output, in order; it must not block.

        `start`: continue from this snapshot; the prompt may then be empty. `keep`: leave a snapshot of the "end" in
        `RunningSequence.snapshot`, or one of the "prompt", and then generate no token. `keep_logits`: keep the logits
        of each token. `text` False: Outputs carry no text. `leader`: has the same prompt, of which this
        is answer number `choice`.
        Raises JetExportError for ids outside the vocabulary, grammars that do not compile and requests that could
        never run; QueueFull. It waits for a grammar that has not been compiled (`grammars`).
        """
        compiled = self.grammars.compile(params.grammar) if params.grammar else None
        check_tokens((*prompt, *params.token_ids), self.engine.config.vocab_size)
        start = start or EMPTY
        params.check(self.eos, start.held)
        tokens = [*start.tokens, *prompt]
        # A session without a new prompt goes on by decoding the token that it sampled last.
        pending = int(start.held > 0 and not prompt and len(tokens) > start.held)
        cached = self.scheduler.prefixes is not None and not (start.held or keep or params.prompt_logprobs is not None)
        hashes = page_hashes(prompt, self.scheduler.capacity.page_size) if cached else ()
        with self.lock:
            if self.stopping:
                raise QueueFull("The engine is shutting down.")
            request = Request(
                prompt_len=len(tokens) - pending,
                max_new_tokens=params.max_new_tokens + pending,
                arrival=self.clock(),
                priority=params.priority,
                text=tokens if cached else None,
                hashes=hashes,
                start=start.held,
                generated=pending,
                leads=cached and params.n > 1 and choice == 0,
                leader=leader.request if leader and cached and leader.prompt == tokens else None,
            )
            try:
                self.scheduler.submit(request)
            except QueueFull:
                self.metrics.requests["refused"] += 1
                raise
            sequence = RunningSequence(
                request=request,
                prompt=tokens,
                params=params,
                text=StopText(self.tokenizer, params.stop) if text or params.stop else None,
                on_output=on_output,
                start=start,
                keep=keep,
                keep_logits=keep_logits,
                choice=choice,
                compiled=compiled,
            )
            self.sequences[request] = sequence
            self.work.notify()
            return sequence

    def cancel(self, sequence: RunningSequence, reason: str = "cancelled") -> None:
        """End a request now: its slot and pages are free on return. Does nothing if it has ended already."""
        with self.lock:
            self.delivery.end(sequence, Output(None, finish_reason=reason))

    def step(self) -> bool:
        """Run one step; False if there is nothing to run.

        With overlap scheduling the next step is planned and launched before the tokens of this one are read, so that
        the device does not wait for the host. A sequence found to have ended is then decoded once more, in vain;
        nothing that uses its slot or pages next can run before that step, as all work goes to one stream. Where
        grammars take part, only the draw of the next step waits for the tokens of this one, while its forward pass
        runs. Where drafts are likely to pay, the next step waits for this one's tokens, not for their delivery.
        """
        step, self.next_step = self.next_step, None
        if step is None:
            step, idle = self._launch(draw=True)
            if step is None:
                self.rested = True
                return not idle
        if self.overlap and not step.blocks_overlap and not self._drafts_likely(step):
            captures = self.runner.graphs.captures
            self.next_step, _ = self._launch(draw=not step.masked, behind=step)
            step.timed &= self.runner.graphs.captures == captures  # its tokens are read behind the capture
        try:
            self._finish(step)
            if self.overlap and self.next_step is None:
                self.next_step, _ = self._launch(draw=True)
        finally:
            with self.lock:
                self.delivering = False
                self.after_step()
        return True

    def _launch(self, draw: bool, behind: InFlightStep | None = None) -> tuple[InFlightStep | None, bool]:
        """Plan and launch a step, `behind` one whose tokens are still to come, if any; with its draw unless grammars
        take part and `draw` is False. (None, True) if there is nothing to run, (None, False) if the launch fails: its
        requests have then ended with an error."""
        with self.lock:
            plan = self.scheduler.plan()
            for request in self.scheduler.expire(self.clock()):
                self.cancel(self.sequences[request], "timeout")
            if plan.empty:
                return None, True
            began, captures = self.clock(), self.runner.graphs.captures
            try:
                drafts = self._drafts(plan, behind is None)
            except Exception as e:
                self.delivery.fail([self.sequences[r] for r in plan.decode], e)
                return None, False
            inputs = self.executor.collect(plan, self.sequences, drafts)
        try:
            step = self.executor.launch(plan, inputs)
            step.launched_at, step.after_rest, self.rested = began, self.rested, False
            step.timed = self.runner.graphs.captures == captures
            if self.speculation and behind is None:
                step.looked = self.speculation.looked
                step.timed &= bool(inputs.drafted) or not self.speculation.proposed
            if draw or not step.masked:
                self.executor.draw(step)
        except Exception as e:
            self._fail(inputs, e)
            return None, False
        with self.lock:
            self.scheduler.advance(plan)
            for request, _, _ in plan.prefill:
                if self.scheduler.prefix_due(request):
                    self.scheduler.keep_prefix(request, self.sequences[request].fed(0, request.held))
        return step, False

    def _drafts(self, plan: Plan, known: bool) -> list[list[int]] | None:
        """Of the requests that decode, all of whose tokens are `known`, otherwise they have none; None: in a plain
        step. Batch-invariant steps are verifying ones without drafts too."""
        if self.speculation is None:
            return None
        self.speculation.proposed = False
        sequences = [self.executor.prepared(self.sequences[r]) for r in plan.decode]
        if known:
            drafts = self.speculation.drafts(sequences, self.executor.look_ahead, plan.prefill_tokens)
        else:
            drafts = [[] for _ in sequences]
        return drafts if self.speculation.fixed or any(drafts) else None

    def _drafts_likely(self, step: InFlightStep) -> bool:
        if self.speculation is None:
            return False
        with self.lock:
            running = [s for s in step.inputs.sampled if s.finish_reason is None]
            likely = self.speculation.likely(running, step.plan.prefill_tokens)
            step.looked += self.speculation.looked
        return likely

    def _draw_next(self) -> None:
        """Launch the draw of the next step, if it has waited for the tokens of this one."""
        step = self.next_step
        if step is not None and step.draw is None:
            try:
                self.executor.draw(step)
            except Exception as e:
                self.next_step = None
                self._fail(step.inputs, e)

    def _finish(self, step: InFlightStep) -> None:
        """Wait for the tokens of a step and hand them out."""
        try:
            tokens, now = step.tokens(), self.clock()
            new = step.inputs.accepted(tokens)
            accept(step.inputs.sampled, new)
            self._draw_next()
            logprobs = step.logprobs()
        except Exception as e:
            self._fail(step.inputs, e)
            self._draw_next()
            return
        with self.lock:
            self._observe(step, new, now)
            self.finished_at, self.delivering = now, True
            delivered = self.delivery.hand_out(step, new, logprobs, now)
            self.metrics.step(now, prompt_tokens=step.plan.prefill_tokens, tokens=delivered)

    def _observe(self, step: InFlightStep, new: list[list[int]], now: float) -> None:
        """What the step took, which gave its sequences `new` tokens."""
        if step.scores:
            return
        decoding, prompt_tokens = len(step.plan.decode), step.plan.prefill_tokens
        if self.pacing and not step.inputs.drafted:
            self.pacing.observe(decoding, prompt_tokens, now - max(step.launched_at, self.finished_at))
        if self.speculation and decoding and step.timed:
            seconds = now - (step.launched_at if step.after_rest else self.finished_at)
            drafted = step.inputs.drafted
            accepted = sum(map(len, new)) - len(new)
            self.speculation.lengths.observe(decoding, drafted, seconds, prompt_tokens, accepted, step.looked)

    def _fail(self, inputs: StepInputs, e: Exception) -> None:
        with self.lock:
            self.delivery.fail(inputs.sequences, e)

    def prepare(self) -> None:
        """Capture the CUDA graphs of the steps to come, and build the vocabulary for grammars."""
        self.grammars.warm_up()
        self.runner.capture_calls(self.scheduler.capacity.token_budget, self.scheduler.prompt_tokens)
        if self.executor.verify:
            self.executor.verify.capture()
        if self.mtp:
            self.mtp.calls.capture()

    def render_metrics(self) -> str:
        """The metrics in Prometheus' text format."""
        with self.lock:
            return self.metrics.render(self.clock(), Gauges.of(self.scheduler))
