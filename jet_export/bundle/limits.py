"""What an engine is made for: sequences at once, their length, and the tokens of a prefill call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

MAX_PREFILL_TOKENS = 32768  # tokens of all sequences in one prefill call
MOST = 2**31 - 1  # of sequences, and of tokens: kernels count them in int32

Limit = Annotated[int, Field(ge=1, le=MOST)]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine's pools and graphs are made for."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    max_batch_size: Limit
    max_seq_len: Limit
    prefill_chunk: Limit  # most tokens of one sequence in one prefill call

    @property
    def max_prefill_tokens(self) -> int:
        """The most packed tokens in a prefill call: chunks of several sequences, up to MAX_PREFILL_TOKENS in all."""
        return max(self.prefill_chunk, min(self.max_batch_size * self.prefill_chunk, MAX_PREFILL_TOKENS))
