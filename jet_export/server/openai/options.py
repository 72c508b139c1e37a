"""What a server is told about its API, whichever process serves it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from jet_export.utils.errors import JetExportError

REASONING_PARSERS = ("qwen3",)
API_KEY = "JET_API_KEY"  # the environment variable


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """Raises JetExportError naming the option that cannot be used."""

    names: tuple[str, ...]  # what clients call the model; answers carry the first
    api_key: str | None = None  # asked for as a bearer token, except by / and /health
    origins: tuple[str, ...] = ()  # of web pages whose scripts may call the API (CORS); "*": any
    access_log: bool = False  # a line for each request
    chat_template: str | None = None  # a file to use instead of the bundle's
    reasoning_parser: str | None = None  # one of REASONING_PARSERS; None: thinking is part of the content
    max_body_bytes: int | None = None  # None: by the longest prompt
    sampling_defaults: dict[str, float] = field(default_factory=dict)  # of fields that a request leaves out

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise JetExportError("--api-key: not a key.", "Give one or more printable ASCII characters.")
        if self.reasoning_parser not in (None, *REASONING_PARSERS):
            known = ", ".join(REASONING_PARSERS)
            raise JetExportError(f"--reasoning-parser {self.reasoning_parser}: not known.", f"Known: {known}.")

    def without_key(self) -> dict[str, Any]:
        """The fields, for a command line, which every user of the machine can read."""
        return {**asdict(self), "api_key": None}

    @classmethod
    def of(cls, values: dict[str, Any], api_key: str | None) -> ApiOptions:
        """The inverse of `without_key`, through JSON."""
        lists = {name: tuple(values[name]) for name in ("names", "origins")}
        return cls(**{**values, **lists, "api_key": api_key})
