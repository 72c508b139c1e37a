"""Sizes of the pools beside a recurrent state (step_buffer.py), without Triton, for those that only allocate them."""

EXTRA = 4  # columns of a step buffer's row after kn [K] and delta [V]: g, and three unused

NO_BUFFER = (None, None, 1)  # step_buffer, state_position and interval of an op's call on states written every token


def buffer_rows(interval: int, rollback: int) -> int:
    """Tokens of a slot's step buffer; 0: the state is written at every token, and there is no buffer."""
    return interval - 1 + rollback
