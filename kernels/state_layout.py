"""Sizes of the pools beside a recurrent state (step_buffer.py), without Triton, for those that only allocate them."""

EXTRA = 4  # columns of a step buffer's row after kn [K] and delta [V]: g, and three unused

NO_BUFFER = (None, None, 1)  # step_buffer, state_position and interval of an op's call on states written every token


def buffer_rows(interval: int, rollback: int) -> int:
    """Tokens of a slot's step buffer; 0: the state is written at every token, and there is no buffer."""
    return interval - 1 + max(rollback, 1) if interval > 1 or rollback else 0


def work_columns(tokens: int, head_k_dim: int, head_v_dim: int) -> int:
    """fp32 numbers that a step of so many tokens on a state with a buffer passes from kernel to kernel, a head and
    sequence (gated_delta_rule_deferred.py); a multiple of 4, so that rows start at multiples of 16 bytes."""
    vectors = 2 * tokens
    return (vectors * (head_k_dim + head_v_dim + vectors) + tokens + 1 + 3) // 4 * 4
