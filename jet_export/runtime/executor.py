"""The executor: runs the scheduler's plans on an engine and samples the tokens.

Only the stepping thread calls it, since only that thread may use the device: it may be capturing a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.runtime.metrics import Metrics
from jet_export.runtime.runner import Runner
from jet_export.runtime.scheduler import Plan, Request
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.snapshot import Snapshot, load_states, save_states
from jet_export.runtime.step import InFlightStep, StepInputs, copy_to_host
from jet_export.runtime.token_sampler import TokenSampler

log = logging.getLogger(__name__)


class Executor:
    """See the module."""

    def __init__(self, engine: Engine, runner: Runner, metrics: Metrics) -> None:
        self.engine, self.runner, self.metrics = engine, runner, metrics
        self.failure: Exception | None = None  # the last one

    def collect(self, plan: Plan, sequences: Mapping[Request, RunningSequence]) -> StepInputs:
        """The inputs of a plan. Called under the engine's lock: a cancellation changes the requests."""
        inputs = StepInputs()
        for request, first, n in plan.prefill:
            sequence = self._prepared(sequences[request])
            inputs.prefill_slots.append(request.slot)
            inputs.prefill_tokens.append(sequence.prompt[first : first + n])
            if first + n == request.prompt_len:
                inputs.prompt_ends.append(len(inputs.prefill_slots) - 1)
                inputs.sampled.append(sequence)
            inputs.sequences.append(sequence)
        for request in plan.resumed:
            sequence = self._prepared(sequences[request])
            assert sequence.start is not None and sequence.start.logits is not None
            inputs.saved_logits.append(sequence.start.logits.to(self.engine.device))
            inputs.sampled.append(sequence)
            inputs.sequences.append(sequence)
        for request in plan.decode:
            sequence = self._prepared(sequences[request])
            inputs.decode_slots.append(request.slot)
            inputs.decode_tokens.append(sequence.last_token)
            inputs.sampled.append(sequence)
            inputs.sequences.append(sequence)
        return inputs

    def launch(self, plan: Plan, inputs: StepInputs) -> InFlightStep:
        """Launch a step; returns before its tokens are known. Raises whatever the engine raises."""
        logits = self._run(inputs)
        tokens = self._sample(inputs.sampled, logits)
        kept = logits.float().cpu() if any(s.keep_logits for s in inputs.sampled) else None
        return InFlightStep(
            plan=plan,
            inputs=inputs,
            logits=logits,
            device_tokens=tokens,
            tokens=copy_to_host(tokens),
            kept_logits=kept,
        )

    def snapshot(self, sequence: RunningSequence, logits: Tensor | None = None) -> Snapshot:
        """The states of a sequence that still owns its slot."""
        slot = sequence.request.slot
        tokens = (*sequence.prompt, *sequence.tokens)
        return Snapshot(tokens, self.runner.context_lens[slot], save_states(self.runner, slot), logits)

    def _prepared(self, sequence: RunningSequence) -> RunningSequence:
        """Before a sequence's first step: give its slot the pages it owns and the states it starts from."""
        if sequence.sampler is None:
            request = sequence.request
            self.runner.assign(request.slot, request.pages, request.window_pages)
            if sequence.start is not None and request.start:
                load_states(self.runner, request.slot, request.start, sequence.start.states)
            if request.entry is not None:
                load_states(self.runner, request.slot, request.entry.end, request.entry.snapshot)
            if request.keys:
                self.metrics.prefix(request.entry.end if request.entry else 0)
            request.entry = None
            vocab = self.engine.config.vocab_size
            sequence.sampler = TokenSampler(sequence.params, sequence.prompt, vocab, self.engine.device)
        return sequence

    def _run(self, inputs: StepInputs) -> Tensor:
        """Logits [len(inputs.sampled), vocab]. They may be a buffer that the next step overwrites."""
        rows: list[Tensor] = []
        if inputs.prefill_slots:
            logits = self.runner.prefill(inputs.prefill_slots, inputs.prefill_tokens)
            if inputs.prompt_ends:
                whole = len(inputs.prompt_ends) == len(logits)
                rows.append(logits if whole else logits[torch.tensor(inputs.prompt_ends, device=logits.device)])
        if inputs.saved_logits:
            rows.append(torch.stack(inputs.saved_logits))
        if inputs.decode_slots:
            tokens = inputs.device_tokens
            if tokens is None:
                tokens = torch.tensor(inputs.decode_tokens, dtype=torch.int64, device=self.engine.device)
            rows.append(self.runner.decode(inputs.decode_slots, tokens))
        if not rows:
            return torch.empty(0, self.engine.config.vocab_size, device=self.engine.device)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _sample(self, sequences: list[RunningSequence], logits: Tensor) -> Tensor:
        """The next token of each sequence, [n] int64; -1 where sampling failed (the model gave NaN)."""
        tokens = logits.argmax(-1)  # all rows in one launch
        for i, sequence in enumerate(sequences):
            assert sequence.sampler is not None
            if not sequence.sampler.is_argmax:
                tokens[i] = self._sample_one(sequence.sampler, logits[i])
        return tokens

    def _sample_one(self, sampler: TokenSampler, logits: Tensor) -> Tensor:
        try:
            return sampler(logits)[0]
        except RuntimeError as e:
            log.exception("sampling failed; the request ends with an error")
            self.failure = e
            return torch.tensor(-1, device=logits.device)
