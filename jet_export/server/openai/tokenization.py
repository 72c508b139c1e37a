"""/tokenize, /detokenize and /tokenizer_info, in vLLM's format."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict

from jet_export.server.fields import Text
from jet_export.server.openai.api import Api
from jet_export.server.openai.messages import Message, Tool
from jet_export.server.openai.protocol import ApiError, Ids, parse

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class TokenizeBody(BaseModel):
    """A text, or the messages of a chat; the template brings its own special tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None  # by default those of a text
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text | None = None
    tokens: Ids


class Tokenization:
    """`config`: of the tokenizer, as tokenizer_config.json has it."""

    def __init__(self, api: Api, config: dict[str, Any]) -> None:
        self.api, self.tokenizer = api, api.engine.tokenizer
        names = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items() if k in SPECIAL_TOKENS}
        self.config = {"tokenizer_class": type(self.tokenizer).__name__, **config, **names}
        if api.template is not None:
            self.config["chat_template"] = api.template.source

    async def tokenize(self, request: Request) -> dict[str, Any]:
        body = parse(TokenizeBody, await self.api.read(request))
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Give either prompt or messages.")
        tokens = await asyncio.to_thread(self._tokens, body)
        return {
            "count": len(tokens),
            "max_model_len": self.api.limits.max_seq_len,
            "tokens": tokens,
            "token_strs": self.tokenizer.pieces(tokens) if body.return_token_strs else None,
        }

    async def detokenize(self, request: Request) -> dict[str, str]:
        body = parse(DetokenizeBody, await self.api.read(request))
        self._check_model(body.model)
        bad = next((t for t in body.tokens if not 0 <= t < 1 << 31), None)
        if bad is not None:
            raise ApiError(400, f"tokens: {bad} is not a token id.")
        return {"prompt": self.tokenizer.decode_with_special(body.tokens)}

    async def info(self) -> dict[str, Any]:
        return self.config

    def _tokens(self, body: TokenizeBody) -> Ids:
        if body.messages is None:
            return self.tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
        tools = [tool.plain() for tool in body.tools or []]
        text = self.api.chat_text(body.messages, tools, body.add_generation_prompt, body.chat_template_kwargs)
        return self.tokenizer.encode(text, body.add_special_tokens is True)

    def _check_model(self, asked: str | None) -> None:
        if asked is not None:
            self.api.check_model(asked)
