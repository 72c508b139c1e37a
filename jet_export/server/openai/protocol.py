"""Request bodies of OpenAI's API, and the engine parameters they map to.

Fields that would change the answer and cannot be honoured are refused by name; those that change nothing here are
accepted. Beyond OpenAI's fields: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos, min_tokens, priority,
chat_template_kwargs.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.server.fields import Bias, Text, bias_pairs, first_error
from jet_export.server.openai.messages import Message, Tool, ToolChoice
from jet_export.server.openai.structured import StructuredFields
from jet_export.server.openai.tools import Toolbox
from jet_export.utils.errors import JetExportError

Ids = list[int]
Penalty = Annotated[float, Field(ge=-2, le=2)]  # OpenAI's range


# Fields that are not supported, with the values that ask for what is done anyway: sglang-router sends them always.
DONE_ANYWAY = {
    "no_stop_trim": False,
    "skip_special_tokens": True,
    "return_hidden_states": False,
    "continue_final_message": False,
    "separate_reasoning": True,
    "stream_reasoning": True,
}


class ApiError(Exception):
    """Answered in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Ignored(BaseModel):
    """Fields of OpenAI's that change no answer here: accepted and ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


class CommonBody(Ignored, StructuredFields):
    model: Text
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: Ids = []
    ignore_eos: bool = False
    min_tokens: int = 0
    priority: int = 0
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int = 1
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Bias = {}

    def params(self, max_new_tokens: int, logprobs: int | None, ends: Iterable[int] = ()) -> Params:
        """`ends`: tokens that end the answer as the end of sequence does. Raises JetExportError. The seed is random
        unless given."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )
        return Params(
            max_new_tokens,
            sampling,
            repetition_penalty=self.repetition_penalty,
            stop=stop,
            stop_ids=(*self.stop_token_ids, *(() if self.ignore_eos else ends)),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            n=self.n,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias_pairs(self.logit_bias),
            min_tokens=self.min_tokens,
            priority=self.priority,
            grammar=self.grammar(),
        )

    def with_defaults(self, defaults: Mapping[str, float]) -> Self:
        """With these values of fields that were left out."""
        return self.model_copy(update={k: v for k, v in defaults.items() if k not in self.model_fields_set})

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, if asked for."""
        return self.max_tokens

    @property
    def usage_in_stream(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(CommonBody):
    prompt: Text | Ids | list[Text] | list[Ids]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str] | list[Ids]:
        """The prompts, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class ChatBody(CommonBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the template, such as enable_thinking
    # What these are without speech and reasoning; predicted outputs only save time.
    modalities: list[Literal["text"]] | None = None
    function_call: Literal["none", "auto"] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    prediction: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        return min((n for n in (self.max_completion_tokens, self.max_tokens) if n is not None), default=None)

    def toolbox(self) -> Toolbox:
        """Raises ApiError 400."""
        several = self.parallel_tool_calls is not False
        with refusing():
            return Toolbox.of(self.tools or (), self.tool_choice, several)


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], raw: bytes) -> Body:
    """Raises ApiError 400 that says which field is wrong and how."""
    try:
        values = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as e:
        raise ApiError(400, f"The body is not UTF-8 (byte {e.start}).") from None
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"The body is not JSON ({str(e)[:200]}).") from None
    if isinstance(values, dict):  # null is as good as absent, even for a field that is not supported
        values = {k: v for k, v in values.items() if v is not None and v is not DONE_ANYWAY.get(k)}
    try:
        return kind.model_validate(values)
    except ValidationError as e:
        raise ApiError(400, first_error(e)) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


@contextmanager
def refusing() -> Iterator[None]:
    """A ValueError inside is an ApiError 400."""
    try:
        yield
    except ValueError as e:
        raise ApiError(400, str(e)) from None


def refusal(e: JetExportError) -> ApiError:
    message = " ".join(str(e).splitlines())
    return ApiError(400, message, "context_length_exceeded" if "max_seq_len" in message else None)
