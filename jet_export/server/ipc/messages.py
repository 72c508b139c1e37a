"""The messages between the engine's process and a front end, as bytes: numbers as they lie in memory (both ends are on
one machine), JSON for what comes once a request. Request ids are the front end's, below 2^32."""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import IntEnum
from itertools import islice
from typing import Any, NamedTuple

from jet_export.runtime.grammar import Grammar
from jet_export.runtime.params import Logprob, Output, Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.serving_engine import Status


class Kind(IntEnum):
    """`front` sends the first four, the engine the others."""

    READY = 1  # it listens
    SUBMIT = 2
    CANCEL = 3
    ASK_STATUS = 4
    OUTPUTS = 5  # of one step
    REFUSED = 6  # a SUBMIT, with its reason
    STATUS = 7
    DRAIN = 8  # accept no more connections, finish the requests and exit
    CACHED = 9  # prompt tokens that the prefix cache had, before a request's first output


REASONS = (None, "stop", "length", "cancelled", "timeout", "error")  # of Output, by their byte
_REASON = {reason: i for i, reason in enumerate(REASONS)}
_NO_TOKEN = -1
_COUNTS = struct.Struct("=II")
_OUTPUT_COUNTS = struct.Struct("=III")
_LOGPROB = struct.Struct("=IId")  # row of its output, length of `top`, chosen
_ID = struct.Struct("=I")


class Submit(NamedTuple):
    """Prompt i has the id `first` + i. Each comes params.n times in a row, and is sent once."""

    first: int
    prompts: list[list[int]]
    params: Params

    def encode(self) -> bytes:
        """Raises OverflowError for a token id of more than 32 bits."""
        prompts = self.prompts[:: self.params.n]
        lengths = array("I", [len(p) for p in prompts])
        tokens = b"".join(array("i", p).tobytes() for p in prompts)
        params = json.dumps(asdict(self.params)).encode()
        return _COUNTS.pack(self.first, len(prompts)) + lengths.tobytes() + tokens + params

    @classmethod
    def decode(cls, data: bytes) -> Submit:
        first, n = _COUNTS.unpack_from(data)
        offset = _COUNTS.size + 4 * n
        lengths = array("I", data[_COUNTS.size : offset])
        prompts = []
        for length in lengths:
            prompts.append(array("i", data[offset : offset + 4 * length]).tolist())
            offset += 4 * length
        values = {k: _tuples(v) for k, v in json.loads(data[offset:]).items()}
        grammar = values["grammar"] and Grammar(**values["grammar"])
        params = Params(**{**values, "sampling": Sampling(**values["sampling"]), "grammar": grammar})
        return cls(first, [p for p in prompts for _ in range(params.n)], params)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class Cancel(NamedTuple):
    """`reason`: the finish reason that the engine counts."""

    id: int
    reason: str

    def encode(self) -> bytes:
        return _COUNTS.pack(self.id, _REASON[self.reason])

    @classmethod
    def decode(cls, data: bytes) -> Cancel:
        i, reason = _COUNTS.unpack(data)
        return cls(i, str(REASONS[reason]))


class Refused(NamedTuple):
    """The SUBMIT of these ids, from `first` on, was refused. `queue_full`: it may be sent again later."""

    first: int
    queue_full: bool
    message: str

    def encode(self) -> bytes:
        return _COUNTS.pack(self.first, self.queue_full) + self.message.encode()

    @classmethod
    def decode(cls, data: bytes) -> Refused:
        first, full = _COUNTS.unpack_from(data)
        return cls(first, bool(full), data[_COUNTS.size :].decode())


def encode_status(question: int, status: Status) -> bytes:
    """`question`: the number that ASK_STATUS came with."""
    return _COUNTS.pack(question, status.alive) + status.metrics.encode()


def decode_status(data: bytes) -> tuple[int, Status]:
    question, alive = _COUNTS.unpack_from(data)
    return question, Status(bool(alive), data[_COUNTS.size :].decode())


def encode_id(i: int) -> bytes:
    return _ID.pack(i)


def decode_id(data: bytes) -> int:
    return int(_ID.unpack(data)[0])


def encode_cached(cached: Sequence[tuple[int, int]]) -> bytes:
    """(request id, tokens) each."""
    return array("I", [n for row in cached for n in row]).tobytes()


def decode_cached(data: bytes) -> Iterator[tuple[int, int]]:
    numbers = array("I", data)
    return zip(numbers[::2], numbers[1::2], strict=True)


def encode_outputs(outputs: Sequence[tuple[int, Output]]) -> bytes:
    """(request id, Output) each, without their text: ids, tokens and reasons, then the rows with log probabilities, of
    their token and of their prompts' tokens."""
    n = len(outputs)
    logprobs = [(row, o.logprob) for row, (_, o) in enumerate(outputs) if o.logprob is not None]
    prompts = [(row, p) for row, (_, o) in enumerate(outputs) for p in o.prompt_logprobs]
    parts = [
        _OUTPUT_COUNTS.pack(n, len(logprobs), len(prompts)),
        array("I", [i for i, _ in outputs]).tobytes(),
        array("i", [_NO_TOKEN if o.token is None else o.token for _, o in outputs]).tobytes(),
        bytes([_REASON[o.finish_reason] for _, o in outputs]),
    ]
    for row, p in (*logprobs, *prompts):
        parts.append(_LOGPROB.pack(row, len(p.top), p.chosen))
        parts.append(array("i", [t for t, _ in p.top]).tobytes())
        parts.append(array("d", [v for _, v in p.top]).tobytes())
    return b"".join(parts)


def decode_outputs(data: bytes) -> Iterator[tuple[int, Output]]:
    n, k, m = _OUTPUT_COUNTS.unpack_from(data)
    at = _OUTPUT_COUNTS.size
    ids, tokens = array("I", data[at : at + 4 * n]), array("i", data[at + 4 * n : at + 8 * n])
    reasons = data[at + 8 * n : at + 9 * n]
    scored = _decode_logprobs(data, at + 9 * n)
    logprobs = dict(islice(scored, k)) if k else {}
    prompts: dict[int, list[Logprob]] = {}
    for row, p in islice(scored, m) if m else ():
        prompts.setdefault(row, []).append(p)
    for row, (i, token, reason) in enumerate(zip(ids, tokens, reasons, strict=True)):
        prompt = tuple(prompts.get(row, ()))
        yield i, Output(None if token == _NO_TOKEN else token, "", logprobs.get(row), REASONS[reason], prompt)


def _decode_logprobs(data: bytes, at: int) -> Iterator[tuple[int, Logprob]]:
    """(row, log probabilities), from byte `at` on; as many as are taken."""
    while True:
        row, n, chosen = _LOGPROB.unpack_from(data, at)
        at += _LOGPROB.size
        tokens, values = array("i", data[at : at + 4 * n]), array("d", data[at + 4 * n : at + 12 * n])
        yield row, Logprob(chosen, tuple(zip(tokens, values, strict=True)))
        at += 12 * n
