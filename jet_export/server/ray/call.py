"""What goes between the ingress and the replicas."""

from __future__ import annotations

from dataclasses import dataclass

from jet_export.runtime.params import Output, Params


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of ServingEngine.submit."""

    number: int  # of its sender; when it is sent again, it goes to another replica
    prompts: list[list[int]]  # each once, of params.n answers
    params: Params
    prefixes: tuple[bytes, ...]  # chained hashes of the first prompt's whole pages: the router looks for them


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The engine did not take the call. `queue_full`: it may be sent again later."""

    message: str
    queue_full: bool


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What has arrived since the last of these: (index of the prompt, its output)."""

    outputs: list[tuple[int, Output]]
    cached: list[int]  # of each prompt, tokens that the prefix cache had
