"""What an engine is made for: sequences at once, their length, and the tokens of a prefill call."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PREFILL_TOKENS = 32768  # tokens of all sequences in one prefill call


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine's pools and graphs are made for."""

    max_batch_size: int
    max_seq_len: int
    prefill_chunk: int  # most tokens of one sequence in one prefill call

    @property
    def max_prefill_tokens(self) -> int:
        """The most packed tokens in a prefill call: chunks of several sequences, up to MAX_PREFILL_TOKENS in all."""
        return max(self.prefill_chunk, min(self.max_batch_size * self.prefill_chunk, MAX_PREFILL_TOKENS))
