"""Bodies of requests, as OpenAI's API has them, and what they ask of the engine.

Fields that the engine could not honour are refused, not ignored. Beside OpenAI's: top_k, repetition_penalty,
stop_token_ids, ignore_eos.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.utils.errors import JetExportError


def _is_text(value: str) -> str:
    """JSON's escapes can spell half of a character, which no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return value


Text = Annotated[str, AfterValidator(_is_text)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[int, Field(ge=1, le=1)]
Ids = list[int]
FAILURES = {  # finish reasons that are no answer: status, message, code
    "timeout": (503, "The request waited too long in the queue. Try again later.", "queue_timeout"),
    "cancelled": (503, "The server is shutting down.", "shutting_down"),
    "error": (500, "The engine failed on this request.", "engine_error"),
}


def max_prompt_bytes(max_seq_len: int) -> int:
    """A token takes a few characters; the longest prompt fits several times over, as text or as JSON numbers."""
    return (1 << 20) + 32 * max_seq_len


class ApiError(Exception):
    """Answered as OpenAI's API does: {"error": {"message", "type", "code"}}."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Common(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: Ids = []
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: str | None = None  # noted by nobody, as metadata and store
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    def params(self, max_new_tokens: int, logprobs: int | None) -> Params:
        """Raises JetExportError. Without a seed, one is drawn."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )
        return Params(
            max_new_tokens, sampling, self.repetition_penalty, stop, tuple(self.stop_token_ids), self.ignore_eos,
            logprobs,
        )  # fmt: skip

    @property
    def usage_in_stream(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(Common):
    prompt: Text | Ids | list[Text] | list[Ids]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: One | None = None

    @property
    def prompts(self) -> list[str] | list[Ids]:
        """One or several, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": self.role, "content": text, **({"name": self.name} if self.name else {})}


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatBody(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None


Body = TypeVar("Body", bound=Common)


def parse(kind: type[Body], raw: bytes) -> Body:
    """Raises ApiError 400 saying which field is wrong and how."""
    try:
        values = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as e:
        raise ApiError(400, f"The body is not UTF-8 (byte {e.start}).") from None
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"The body is not JSON ({str(e)[:200]}).") from None
    if isinstance(values, dict):  # null asks for nothing, also where the field is not supported
        values = {k: v for k, v in values.items() if v is not None}
    try:
        return kind.model_validate(values)
    except ValidationError as e:
        raise ApiError(400, first_error(e)) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def first_error(e: ValidationError) -> str:
    error = e.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(x) for x in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where[:100]} is not supported."
    return f"{where[:100]}: {error['msg']}."


def refusal(e: JetExportError) -> ApiError:
    message = " ".join(str(e).splitlines())
    return ApiError(400, message, "context_length_exceeded" if "max_seq_len" in message else None)
