"""What both servers share about requests: field types, the text of a validation error, and the reasons of failures."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field, ValidationError

MAX_BIASES = 1024  # entries of logit_bias


def _encodable(value: str) -> str:
    """JSON escapes can spell half a surrogate pair, which no tokenizer accepts."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not text") from None
    return value


def _bias(values: dict[str, float]) -> dict[str, float]:
    """OpenAI's: token id -> -100 to 100."""
    if len(values) > MAX_BIASES:
        raise ValueError(f"{len(values)} tokens; at most {MAX_BIASES}")
    for token, bias in values.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ValueError(f"{token[:20]!r} is not a token id")
        if not -100 <= bias <= 100:
            raise ValueError(f"{bias} for token {token} is not between -100 and 100")
    return values


def bias_pairs(values: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """As Params has them."""
    return tuple((int(token), float(bias)) for token, bias in values.items())


Text = Annotated[str, AfterValidator(_encodable)]
Bias = Annotated[dict[str, float], AfterValidator(_bias)]
One = Annotated[int, Field(ge=1, le=1)]


class Failure(NamedTuple):
    """How a request that failed is answered."""

    status: int  # of HTTP
    message: str
    code: str


FAILURES = {  # by finish reason; the other finish reasons are answers
    "timeout": Failure(503, "The request waited too long in the queue. Try again later.", "queue_timeout"),
    "cancelled": Failure(503, "The server is shutting down.", "shutting_down"),
    "error": Failure(500, "The engine failed on this request.", "engine_error"),
}


def max_prompt_bytes(max_seq_len: int) -> int:
    """Limit on a prompt's size: several times the longest prompt, as text or as JSON numbers."""
    return (1 << 20) + 32 * max_seq_len


def first_error(e: ValidationError) -> str:
    """Which field is wrong and how."""
    error = e.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(x) for x in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where[:100]} is not supported."
    return f"{where[:100]}: {error['msg'].removeprefix('Value error, ')}."
