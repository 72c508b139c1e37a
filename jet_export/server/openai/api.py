"""/v1/completions and /v1/chat/completions: from the body of a request to its response."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from jet_export.runtime.params import MAX_CHOICES, Params
from jet_export.runtime.serving_engine import ServingEngine
from jet_export.server.fields import max_prompt_bytes
from jet_export.server.openai.answers import Answer, ChatAnswer, CompletionAnswer
from jet_export.server.openai.chat import ChatTemplate
from jet_export.server.openai.events import EventStream, collect, raise_failure, until_disconnect
from jet_export.server.openai.messages import Message
from jet_export.server.openai.options import ApiOptions
from jet_export.server.openai.protocol import ApiError, ChatBody, CommonBody, CompletionBody, parse, refusing
from jet_export.server.openai.reasoning import ReasoningAnswer, ReasoningToolAnswer, opens
from jet_export.server.openai.spans import generating
from jet_export.server.openai.tool_answers import ToolAnswer

T = TypeVar("T")


def repeated(values: list[T], n: int) -> list[T]:
    return [value for value in values for _ in range(n)]


class Api:
    """The generation endpoints, over one engine."""

    def __init__(self, engine: ServingEngine, options: ApiOptions, template: ChatTemplate | None) -> None:
        self.engine, self.names, self.template = engine, options.names, template
        self.name, self.defaults = self.names[0], options.sampling_defaults
        self.reasoning = options.reasoning_parser is not None
        self.turn_ends = template.turn_ends(engine.tokenizer) if template else ()
        self.limits = engine.limits
        self.max_body_bytes = options.max_body_bytes or max_prompt_bytes(self.limits.max_seq_len)

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self.read(request)).with_defaults(self.defaults)
        self.check_model(body.model)
        asked = body.prompts
        self._check_number(len(asked), body.n)
        if body.best_of not in (None, body.n):
            raise ApiError(400, f"best_of {body.best_of} is not supported, except as n.")
        prompts = await asyncio.to_thread(lambda: [self.ids(p) for p in asked])
        empty = bool(body.echo) and body.max_tokens == 0  # the engine makes a token at least
        params = body.params(int(empty) or (16 if body.max_tokens is None else body.max_tokens), body.logprobs)
        scored = bool(body.echo) and body.logprobs is not None
        if scored:
            params = replace(params, prompt_logprobs=body.logprobs)
        decode = self.engine.tokenizer.decode
        echo = [p if isinstance(p, str) else decode(p) for p in asked] if body.echo else None
        prompts, echo = repeated(prompts, body.n), echo and repeated(echo, body.n)
        answer = CompletionAnswer(self.name, self.engine.tokenizer, prompts, echo, scored=scored, empty=empty)
        return await self._answer(request, body, answer, params)

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self.read(request)).with_defaults(self.defaults)
        self.check_model(body.model)
        self._check_number(1, body.n)
        box = body.toolbox()
        more, formed = body.chat_template_kwargs or {}, box.required or body.grammar() is not None
        if self.reasoning and formed:  # the form would begin inside of the thinking
            if more.get("enable_thinking"):
                raise ApiError(400, "chat_template_kwargs.enable_thinking: an answer in a given form has no thinking.")
            more = {**more, "enable_thinking": False}
        text, prompt = await asyncio.to_thread(self._chat_prompt, body.messages, box.described(), more)
        room = max(self.limits.max_seq_len - len(prompt), 1)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = body.params(room if body.limit is None else body.limit, logprobs, self.turn_ends)
        prompts = [prompt] * body.n
        named = self.name, self.engine.tokenizer, prompts
        answer = ReasoningAnswer(*named) if self.reasoning else ChatAnswer(*named)
        if box.tools:
            answer = (ReasoningToolAnswer if self.reasoning else ToolAnswer)(*named, box)
            if params.grammar and not box.required:  # it would keep the model from calling any
                raise ApiError(
                    400, "tools go with a response_format or grammar only if tool_choice asks for a call, or for none."
                )
            params = replace(params, grammar=box.grammar() or params.grammar)
        if isinstance(answer, ReasoningAnswer | ReasoningToolAnswer):
            answer.think(opens(text) and not formed)
        return await self._answer(request, body, answer, params)

    def _check_number(self, prompts: int, n: int) -> None:
        limit = self.limits.slots + self.limits.max_waiting
        if not 1 <= n <= MAX_CHOICES:
            raise ApiError(400, f"n {n} is not between 1 and {MAX_CHOICES}.")
        if not 1 <= prompts * n <= limit:
            times = f", {n} answers to each" if n > 1 else ""
            raise ApiError(400, f"prompt: {prompts} prompts{times}; between 1 and {limit} are accepted.")

    def _chat_prompt(
        self, messages: list[Message], tools: list[dict[str, Any]], more: dict[str, Any]
    ) -> tuple[str, list[int]]:
        text = self.chat_text(messages, tools, more=more)
        return text, self.ids(text, special_tokens=False)

    def chat_text(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        generation_prompt: bool = True,
        more: dict[str, Any] | None = None,
    ) -> str:
        """The messages through the chat template; `more`: its other variables. Raises ApiError and JetExportError."""
        if self.template is None:
            raise ApiError(400, f"{self.name}'s tokenizer has no chat template; use /v1/completions.")
        with refusing():
            plain = [m.plain(f"messages.{i}") for i, m in enumerate(messages)]
        return self.template(plain, generation_prompt, tools, more)

    async def read(self, request: Request) -> bytes:
        """The body. Raises ApiError if it is longer than allowed or not JSON by its type."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Content-Type must be application/json.")
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > self.max_body_bytes:
                raise ApiError(413, f"The body is longer than {self.max_body_bytes} bytes.")
        return bytes(raw)

    def check_model(self, asked: str) -> None:
        if asked not in self.names:
            raise ApiError(404, f"Model {asked[:100]!r} is not served here; {self.name!r} is.", "model_not_found")

    def ids(self, prompt: str | list[int], special_tokens: bool = True) -> list[int]:
        if isinstance(prompt, str):
            return self.engine.tokenizer.encode(prompt, special_tokens)
        return prompt

    async def _answer(self, request: Request, body: CommonBody, answer: Answer, params: Params) -> Response:
        answer.n = params.n
        outputs = self.engine.submit(answer.prompts, params)
        ended = generating(request.scope, answer, params, body.limit)
        try:
            if not body.stream:
                await until_disconnect(request, collect(outputs, answer))
                ended(None)
                return JSONResponse(answer.result())
            # Before the stream begins, a failure still gets its own status.
            first = await until_disconnect(request, outputs.batch())
            raise_failure(first[0][1])
            return EventStream(first, outputs, answer, body.usage_in_stream, ended)
        except BaseException as e:
            outputs.close()
            ended(e.code or str(e.status) if isinstance(e, ApiError) else type(e).__name__)
            raise
