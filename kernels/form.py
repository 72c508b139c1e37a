"""The form of a call, an attribute of `jet_block`, `gated_delta_rule` and `attention`, as ops and as ONNX nodes."""

from enum import IntEnum


class Form(IntEnum):
    """What the sequences of a call are. It chooses the kernels when an op is traced."""

    PREFILL = 0  # prompt chunks of any length
    DECODE = 1  # one token each
    MIXED = 2  # sequences of one token as in DECODE, longer ones as in PREFILL
    VERIFY = 3  # 1 to MAX_VERIFY tokens each, the last of which the next call may take back (step_buffer.py)


MAX_VERIFY = 16  # tokens of a sequence in a call of the form VERIFY
