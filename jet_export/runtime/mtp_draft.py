"""Drafts of the checkpoint's multi-token-prediction layer (model/mtp.py), which an engine has beside the model.

The layer reads pairs: a token's hidden state and the token behind it. Every call of the engine leaves the hidden states
of its tokens in the pages of full attention, where prefixes, sessions and preempted requests have theirs too, and where
the states of tokens that are taken back are written over. The layer's keys and values are in pages of its own, a slot's
max_seq_len long. A draft's first token comes of the last known pair, each other one of the layer's own output and the
token before it; the next draft writes over what those left.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.model.cache import PAGE, PackedBatch, allocate_states, cdiv, mtp_spec
from jet_export.runtime.capacity import Serving
from jet_export.runtime.draft_model import Draw
from jet_export.runtime.prompt_lookup import NO_MATCH, Match
from jet_export.runtime.runner import Runner
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.transfer import to_device
from jet_export.utils.errors import JetExportError


class MtpDraft:
    """A Proposer. Slot i of the batch has slot i here. `runner`: the batch's, before the first draft."""

    guesses = False
    runner: Runner

    def __init__(self, engine: Engine, slots: int) -> None:
        pages = cdiv(engine.limits.max_seq_len, PAGE)
        self.engine = engine
        (self.kv_cache,) = allocate_states(
            [mtp_spec(engine.config, engine.dtype)], {"pages": slots * pages}, engine.device
        )
        self.table = torch.arange(slots * pages, dtype=torch.int32, device=engine.device).reshape(slots, pages)
        self.known: dict[RunningSequence, int] = {}  # pairs of each that its keys and values are of

    def forget(self, sequence: RunningSequence) -> None:
        self.known.pop(sequence, None)

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        pairs = pairs_of(sequence)
        room = self.engine.limits.max_seq_len - pairs - 1
        return Match([0] * min(most, room), 0) if pairs > 0 and room > 0 else NO_MATCH

    @torch.inference_mode()
    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: Draw) -> list[list[int]]:
        """Those whose pairs do not fit a call, as a long prompt's do not at first, only go on by some."""
        if self.runner.deterministic and len(sequences) > 1:  # the others change no bit of a draft
            return [d for s, o in zip(sequences, offers, strict=True) for d in self.draft([s], [o], draw)]
        drafts: list[list[int]] = [[] for _ in sequences]
        logits, hidden = self._feed(sequences)
        rows = [i for i, s in enumerate(sequences[: len(logits)]) if self.known[s] == pairs_of(s)]
        rows.sort(key=lambda i: -len(offers[i].tokens))
        if not rows:
            return drafts
        index = to_device(torch.tensor(rows), self.engine.device)
        slots, lengths = [sequences[i].request.slot for i in rows], [len(offers[i].tokens) for i in rows]
        found = self._go_on(
            slots, [pairs_of(sequences[i]) for i in rows], lengths, (logits[index], hidden[index]), draw
        )
        for n, i in enumerate(rows):
            drafts[i] = [tokens[n] for tokens in found[: lengths[n]]]
        return drafts

    def _feed(self, sequences: Sequence[RunningSequence]) -> tuple[Tensor, Tensor]:
        """The layer's outputs of the last pair of each that is fed: of all but the first ones, where a call is full."""
        limits, left = self.engine.limits, self.engine.limits.max_prefill_tokens
        fed, slots, lens, held = list[int](), list[int](), list[int](), list[int]()
        for s in sequences:
            pairs = pairs_of(s)
            known = min(self.known.get(s, 0), pairs - 1)  # the last pair again, where it has been fed
            n = min(pairs - known, limits.prefill_chunk, left)
            if n == 0:
                break
            left -= n
            self.known[s] = known + n
            fed += s.fed(known + 1, n)
            slots.append(s.request.slot)
            lens.append(n)
            held.append(known)
        batch = self._batch(slots, lens, held)
        last = batch.cu_seqlens[1:] - 1
        ids = to_device(torch.tensor(fed), self.engine.device)
        return self.engine.predict(ids, self._hidden(slots, lens, held), batch, last, self.kv_cache)

    def _hidden(self, slots: list[int], lens: list[int], held: list[int]) -> Tensor:
        """[T, hidden]: the hidden states of the next tokens of each slot."""
        rows = [slot for slot, n in zip(slots, lens, strict=True) for _ in range(n)]
        positions = [p for first, n in zip(held, lens, strict=True) for p in range(first, first + n)]
        row, p = to_device(torch.tensor([rows, positions]), self.engine.device)
        found: Tensor = self.runner.states[-1][self.runner.block_table[row, p // PAGE].long(), 0, 0, p % PAGE]
        return found

    def _go_on(
        self, slots: list[int], held: list[int], lengths: list[int], outputs: tuple[Tensor, Tensor], draw: Draw
    ) -> list[list[int]]:
        """The first tokens of all slots, the second ones of those that have two, ...; `lengths` descend."""
        logits, hidden = outputs
        drawn = [draw(logits, slots, [0] * len(slots))]
        for ahead in range(1, lengths[0]):
            n = sum(length > ahead for length in lengths)
            batch = self._batch(slots[:n], [1] * n, [h + ahead - 1 for h in held[:n]])
            tokens = drawn[-1][:n].clamp_min(0).long()
            logits, hidden = self.engine.predict(tokens, hidden[:n], batch, None, self.kv_cache)
            drawn.append(draw(logits, slots[:n], [ahead] * n))
        return [tokens.tolist() for tokens in drawn]

    def _batch(self, slots: list[int], lens: list[int], held: list[int]) -> PackedBatch:
        ends, rows, context = (
            to_device(torch.tensor(values, dtype=torch.int32), self.engine.device)
            for values in (list(accumulate(lens, initial=0)), slots, held)
        )
        table = self.table[rows]
        return PackedBatch(ends, rows, context, table, table)


def pairs_of(sequence: RunningSequence) -> int:
    """Its tokens but the last, whose hidden state is still to come."""
    return len(sequence.prompt) + sequence.position - 1


def mtp_draft(engine: Engine, serving: Serving) -> MtpDraft | None:
    """Where `serving` asks for it. Raises JetExportError for a bundle without the layer."""
    if serving.speculate != "mtp":
        return None
    if not engine.mtp:
        raise JetExportError(
            "speculate mtp: the bundle has no multi-token-prediction layer.",
            "Build it of a Qwen3.5 checkpoint with --speculate N --mtp, or draft by speculate lookup.",
        )
    return MtpDraft(engine, serving.slots or engine.limits.max_batch_size)
