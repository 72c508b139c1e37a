"""What an engine is made for: sequences at once, their length, and the tokens of a prefill call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine's pools and graphs are made for."""

    max_batch_size: int
    max_seq_len: int
    prefill_chunk: int  # most tokens of one sequence in one prefill call


MAX_PREFILL_TOKENS = 32768  # tokens of all sequences in one prefill call


def max_prefill_tokens(max_batch_size: int, prefill_chunk: int) -> int:
    """The most packed tokens a prefill graph sees: whole chunks of several sequences, up to MAX_PREFILL_TOKENS."""
    return max(prefill_chunk, min(max_batch_size * prefill_chunk, MAX_PREFILL_TOKENS))
