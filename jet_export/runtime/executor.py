"""The executor: runs the scheduler's plans on an engine and samples the tokens.

Only the stepping thread calls it, since only that thread may use the device: it may be capturing a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.runtime.grammar_masks import TokenMasks
from jet_export.runtime.logprobs import launch_logprobs
from jet_export.runtime.plan import Plan, Request
from jet_export.runtime.runner import Runner
from jet_export.runtime.sampler import SlotSampler
from jet_export.runtime.scoring import Score, ScoredChunk, score_chunks
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.snapshot import Snapshot, load_states, save_states
from jet_export.runtime.step import Draw, InFlightStep, StepInputs
from jet_export.runtime.transfer import copy_to_host
from jet_export.runtime.verify_calls import VerifyCalls


class Executor:
    """See the module."""

    def __init__(self, engine: Engine, runner: Runner, eos: tuple[int, ...], verify_rows: int = 0) -> None:
        """`verify_rows`: tokens of a row of a verifying call, at most; 0: there are none."""
        self.engine, self.runner, self.eos = engine, runner, eos
        slots, vocab = len(runner.context_lens), engine.config.vocab_size
        self.sampler = SlotSampler(slots, vocab, engine.device, last_tokens=runner.last_tokens)
        self.sampler.warm_up(engine.dtype, verify_rows > 0)
        self.masks = TokenMasks(slots * max(1, verify_rows), vocab, engine.device)
        self.verify = VerifyCalls(runner, verify_rows) if verify_rows else None
        self.failure: Exception | None = None  # the last one
        self.on_begin: Callable[[RunningSequence], None] = lambda sequence: None  # it takes a slot

    def collect(
        self, plan: Plan, sequences: Mapping[Request, RunningSequence], drafts: list[list[int]] | None = None
    ) -> StepInputs:
        """The inputs of a plan. `drafts`: of each request that decodes, [] for none; None: in a plain step. Called
        under the engine's lock: a cancellation changes the requests."""
        inputs = StepInputs(drafts=drafts if plan.decode else None)
        self.runner.extend([(r.slot, r.pages, n) for r, n in plan.grown if r.prepared])
        for request, first, n in plan.prefill:
            sequence = self.prepared(sequences[request])
            inputs.sequences.append(sequence)
            tokens, ends = sequence.fed(first, n), first + n == request.prefill_len and not request.generated
            if sequence.score_to(first + n):
                chunk = ScoredChunk(sequence=sequence, slot=request.slot, first=first, tokens=tokens, ends=ends)
                inputs.scored.append(chunk)
                continue
            inputs.prefill_slots.append(request.slot)
            inputs.prefill_tokens.append(tokens)
            if ends:
                inputs.prompt_ends.append(len(inputs.prefill_slots) - 1)
                inputs.sampled.append(sequence)
        inputs.sampled += [chunk.sequence for chunk in inputs.scored if chunk.ends]
        for request in plan.resumed:
            sequence = self.prepared(sequences[request])
            assert sequence.start is not None and sequence.start.logits is not None
            inputs.saved_logits.append(sequence.start.logits.to(self.engine.device))
            inputs.sampled.append(sequence)
            inputs.sequences.append(sequence)
        for request in plan.decode:
            sequence = self.prepared(sequences[request])
            inputs.decode_slots.append(request.slot)
            inputs.sampled.append(sequence)
            inputs.sequences.append(sequence)
        inputs.sampled_slots = [s.request.slot for s in inputs.sampled]
        return inputs

    @torch.inference_mode()
    def launch(self, plan: Plan, inputs: StepInputs) -> InFlightStep:
        """Launch the forward pass of a step; `draw` comes next. Raises whatever the engine raises."""
        logits, scores = self._run(inputs)
        return InFlightStep(plan=plan, inputs=inputs, logits=logits, scores=scores)

    @torch.inference_mode()
    def draw(self, step: InFlightStep) -> None:
        """Launch the draw of a step's tokens; returns before they are known. Its sequences with a grammar have been
        told the tokens of the step before. Raises whatever the engine raises."""
        sampled, logits = step.inputs.sampled, step.logits
        tokens, lse = self._draw_drafted(step) if step.inputs.drafted else self._draw_plain(step)
        rows = list(zip(step.inputs.first_rows, step.inputs.sampled_drafts, sampled, strict=True))
        top = {
            first + i: s.params.logprobs
            for first, draft, s in rows
            for i in range(1 + len(draft))
            if s.params.logprobs is not None
        }
        on_host = copy_to_host(tokens)
        step.draw = Draw(
            tokens=lambda: on_host().tolist(),
            logprobs=launch_logprobs(logits, tokens, lse, top),
            prompt_logits={first: logits[first].clone() for first, _, s in rows if s.keep == "prompt"},
            kept_logits=logits.float().cpu() if any(s.keep_logits for s in sampled) else None,
        )

    def _draw_plain(self, step: InFlightStep) -> tuple[Tensor, Tensor]:
        allowed = self.masks.fill([s.matcher for s in step.inputs.sampled]) if step.masked else None
        slots = torch.tensor(step.inputs.sampled_slots, dtype=torch.int32)
        return self.sampler.sample(step.logits, self.runner.to_device(slots), allowed)

    def _draw_drafted(self, step: InFlightStep) -> tuple[Tensor, Tensor]:
        """Of a step with drafts, every position as if those before it were right. `advance` moves the slots on."""
        inputs = step.inputs
        slots: list[int] = []  # of each row of logits, as these:
        ahead: list[int] = []
        fed: list[int] = []
        for slot, draft in zip(inputs.sampled_slots, inputs.sampled_drafts, strict=True):
            slots += [slot] * (1 + len(draft))
            ahead += range(1 + len(draft))
            fed += [0, *draft]  # the first is in the slot's counts already
        allowed = self.masks.fill([s.matcher for s in inputs.sampled], inputs.sampled_drafts) if step.masked else None
        return self.sampler.look_ahead(step.logits, slots, ahead, fed, allowed)

    @torch.inference_mode()
    def look_ahead(self, logits: Tensor, slots: list[int], ahead: list[int]) -> Tensor:
        """Tokens [n] that the requests in these slots would draw from logits [n, vocab], at positions further on."""
        return self.sampler.look_ahead(logits, slots, ahead)[0]

    def take(self, slot: int, n: int) -> None:
        """n more tokens of this slot's row count: its states hold them, or those before drafted ones."""
        self.runner.context_lens[slot] += n

    @torch.inference_mode()
    def advance(self, made: dict[int, list[int]]) -> None:
        """The new tokens of slots, in a step with drafts."""
        self.sampler.advance(made)

    def snapshot(self, sequence: RunningSequence, logits: Tensor | None = None) -> Snapshot:
        """The states of a sequence that still owns its slot."""
        slot = sequence.request.slot
        tokens = (*sequence.prompt, *sequence.tokens)
        return Snapshot(tokens, self.runner.context_lens[slot], save_states(self.runner, slot), logits)

    def prepared(self, sequence: RunningSequence) -> RunningSequence:
        """The sequence, and before its first step in a slot tell the runner and the sampler what is there."""
        request = sequence.request
        if not request.prepared:
            request.prepared = True
            self.runner.assign(request.slot, request.pages, request.window_pages)
            if request.restored:
                self.runner.hold(request.slot, request.held)
            elif sequence.start is not None and request.start:
                load_states(self.runner, request.slot, request.start, sequence.start.states)
            sequence.position = request.generated - request.begun  # none, if it has been preempted and replays
            made = sequence.tokens[: sequence.position]
            sequence.match(made, self.eos)
            self.on_begin(sequence)
            masked = sequence.compiled is not None
            self.sampler.begin(request.slot, sequence.row_settings(self.eos), sequence.prompt, made, masked)
            if request.generated:  # decodes the token that was sampled last, here or by its session
                (token,) = sequence.fed(request.prompt_len + request.generated - 1, 1)
                self.runner.last_tokens[request.slot] = token
        return sequence

    def _run(self, inputs: StepInputs) -> tuple[Tensor, list[Score]]:
        """Logits [rows, vocab], which may be a buffer that the next step overwrites, and the scores."""
        ended, scores = score_chunks(inputs.scored, self.runner)
        together = bool(inputs.prefill_slots) and not self.runner.deterministic and inputs.drafts is None
        prompts, decoded = self._together(inputs, inputs.decode_slots) if together else self._apart(inputs)
        saved = [torch.stack(inputs.saved_logits)] if inputs.saved_logits else []
        rows = [x for x in (*prompts, *ended, *saved, *decoded) if len(x)]
        if not rows:
            return torch.empty(0, self.engine.config.vocab_size, device=self.engine.device), scores
        return rows[0] if len(rows) == 1 else torch.cat(rows), scores

    def _together(self, inputs: StepInputs, decode: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of the prompts that end and of the slots that decode, in one call: all rows share its products."""
        slots, tokens, ends = inputs.prefill_slots, inputs.prefill_tokens, inputs.prompt_ends
        rest = sorted(set(range(len(slots))) - set(ends))  # their logits are of no use: they come last
        n = len(ends)
        fed: list[list[int] | None] = [*(tokens[i] for i in ends), *[None] * len(decode), *(tokens[i] for i in rest)]
        logits = self.runner.mixed([*(slots[i] for i in ends), *decode, *(slots[i] for i in rest)], fed)
        return [logits[:n]], [logits[n : n + len(decode)]]

    def _apart(self, inputs: StepInputs) -> tuple[list[Tensor], list[Tensor]]:
        """The same in two calls: those of batch-invariant steps do not depend on each other, and drafts are verified
        in calls of their own."""
        prompts: list[Tensor] = []
        decode = inputs.decode_slots
        if inputs.prefill_slots and self.runner.deterministic:
            logits = self.runner.prefill(inputs.prefill_slots, inputs.prefill_tokens)
            prompts.append(logits[self.runner.to_device(torch.tensor(inputs.prompt_ends, dtype=torch.int64))])
        elif inputs.prefill_slots:
            prompts, _ = self._together(inputs, [])
        if not decode:
            return prompts, []
        if inputs.drafts is None:
            return prompts, [self.runner.decode(decode)]
        assert self.verify is not None
        logits = self.verify.run(decode, inputs.drafts)
        for slot in decode:  # of each row its first token, whatever becomes of its draft
            self.take(slot, 1)
        return prompts, [logits]
