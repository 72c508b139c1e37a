"""Drafts of a checkpoint's multi-token-prediction layer (model/mtp.py), over the PyTorch model.

The layer reads the model's last hidden state of every token, which `HiddenStateEngine` keeps by slot and position. What
it is fed are pairs: a token's hidden state and the token behind it. Its keys and values are pages of its own, a
sequence's tokens long. A draft's first token comes of the last known pair, each other one of the layer's own output and
the token before it; the next draft writes over what those left.

Compiled engines give their logits only, so a bundle is not drafted for in this way yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from jet_export.backends.eager import EagerEngine
from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch, allocate_states, pages_per_sequence, state_specs
from jet_export.model.linear import normed
from jet_export.model.mtp import MultiTokenPredictor
from jet_export.runtime.draft_model import Draw
from jet_export.runtime.prompt_lookup import NO_MATCH, Match
from jet_export.runtime.sequence import RunningSequence


class HiddenStateEngine(EagerEngine):
    """The PyTorch model, which keeps the hidden states behind its last norm: `hidden` [slots, max_seq_len, hidden].

    `recorded[slot]`: how many of a slot's first tokens it has them of; those that a prefix cache or a session brings
    are missing, and with them all behind."""

    hidden: Tensor | None = None
    recorded: list[int]

    def step(
        self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor], logit_indices: Tensor | None, form: Form
    ) -> Tensor:
        out = self.model.forward_packed(
            input_ids, batch, states, logit_indices, form, hidden_states=True, interval=self.state_interval
        )
        self._record(normed(out.hidden_states[-1], self.model.norm), batch, slots=self._slots(states))
        return out.logits

    def _slots(self, states: list[Tensor]) -> int:
        """Rows of the pools that have one a slot; without any, the engine's limit."""
        rows = [len(pool) for spec, pool in zip(self.specs, states, strict=True) if spec.rows == "slots"]
        return rows[0] if rows else self.limits.max_batch_size

    def _record(self, last: Tensor, batch: PackedBatch, slots: int) -> None:
        if self.hidden is None:
            self.hidden = last.new_zeros(slots, self.limits.max_seq_len, last.shape[1])
            self.recorded = [0] * slots
        ends, held = batch.cu_seqlens.tolist(), batch.context_lens.tolist()
        for (begin, end), slot, first in zip(pairwise(ends), batch.slots.tolist(), held, strict=True):
            if slot >= 0:
                self.hidden[slot, first : first + end - begin] = last[begin:end]
                known = first <= self.recorded[slot]
                self.recorded[slot] = first + end - begin if known or not first else 0


class MtpDraft:
    """A Proposer. Slot i of the batch has slot i here."""

    guesses = False

    def __init__(self, engine: HiddenStateEngine, predictor: MultiTokenPredictor, slots: int) -> None:
        self.engine, self.predictor = engine, predictor
        pages, _ = pages_per_sequence(predictor.config, engine.limits.max_seq_len, engine.limits.prefill_chunk)
        specs = state_specs(predictor.config, engine.dtype)
        self.states = allocate_states(specs, {"pages": slots * pages}, engine.device)
        self.table = torch.arange(slots * pages, dtype=torch.int32, device=engine.device).reshape(slots, pages)
        self.known: dict[RunningSequence, int] = {}  # pairs of each that its keys and values are of

    def forget(self, sequence: RunningSequence) -> None:
        self.known.pop(sequence, None)
        if self.engine.hidden is not None:  # what its slot has is another sequence's
            self.engine.recorded[sequence.request.slot] = 0

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        """As long as may be, where the hidden states of all tokens but the last are there."""
        pairs = len(sequence.prompt) + sequence.position - 1
        room = self.engine.limits.max_seq_len - pairs - 1
        there = self.engine.hidden is not None and self.engine.recorded[sequence.request.slot] >= pairs > 0
        return Match([0] * min(most, room), 0) if there and room > 0 else NO_MATCH

    @torch.inference_mode()
    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: Draw) -> list[list[int]]:
        order = sorted(range(len(sequences)), key=lambda i: -len(offers[i].tokens))
        lengths = [len(offers[i].tokens) for i in order]
        slots = [sequences[i].request.slot for i in order]
        hidden = self._feed([sequences[i] for i in order])
        drawn = [draw(self.predictor.logits(hidden), slots, [0] * len(slots))]
        held = [self.known[sequences[i]] for i in order]
        for ahead in range(1, lengths[0]):
            n = sum(length > ahead for length in lengths)
            batch = self._batch(slots[:n], [1] * n, [h + ahead - 1 for h in held[:n]])
            hidden = self.predictor(drawn[-1][:n].clamp_min(0), hidden[:n], batch, self.states, Form.DECODE)
            drawn.append(draw(self.predictor.logits(hidden), slots[:n], [ahead] * n))
        steps, drafts = [tokens.tolist() for tokens in drawn], list[list[int]]([] for _ in sequences)
        for n, i in enumerate(order):
            drafts[i] = [tokens[n] for tokens in steps[: lengths[n]]]
        return drafts

    def _feed(self, sequences: list[RunningSequence]) -> Tensor:
        """h' [sequences, hidden] of the last known pair of each."""
        assert self.engine.hidden is not None
        tokens, hidden, lens, held = list[int](), list[Tensor](), list[int](), list[int]()
        for s in sequences:
            known, pairs = self.known.get(s, 0), len(s.prompt) + s.position - 1
            known = min(known, pairs - 1)  # the last pair again, where it has been fed: its output is wanted
            tokens += s.fed(known + 1, pairs - known)
            hidden.append(self.engine.hidden[s.request.slot, known:pairs])
            lens.append(pairs - known)
            held.append(known)
            self.known[s] = pairs
        batch = self._batch([s.request.slot for s in sequences], lens, held)
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.engine.device)
        out: Tensor = self.predictor(ids, torch.cat(hidden), batch, self.states, Form.MIXED)
        return out[batch.cu_seqlens[1:].long() - 1]

    def _batch(self, slots: list[int], lens: list[int], held: list[int]) -> PackedBatch:
        ends, rows, context = (
            torch.tensor(values, dtype=torch.int32, device=self.engine.device)
            for values in (list(accumulate(lens, initial=0)), slots, held)
        )
        table = self.table[rows.long()]
        return PackedBatch(ends, rows, context, table, table)
