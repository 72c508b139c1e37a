"""Chat answers whose text may call functions: the calls become `tool_calls`, whole or as deltas of a stream."""

from __future__ import annotations

import secrets
from typing import Any

from jet_export.runtime.params import Output
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer
from jet_export.server.openai.answers import ChatAnswer, event
from jet_export.server.openai.tool_stream import ArgumentsPiece, CallBegins, Piece, TextPiece, ToolParser
from jet_export.server.openai.tools import Toolbox


class ToolAnswer(ChatAnswer):
    """An answer that ends by itself, with a call in it, has the finish reason "tool_calls"."""

    def __init__(self, model: str, tokenizer: Tokenizer | ByteTokenizer, prompts: list[list[int]], box: Toolbox):
        super().__init__(model, tokenizer, prompts)
        self.box = box
        self._parsers = [ToolParser(box.schemas, box.several) for _ in prompts]

    def choice(self, index: int, text: str, outputs: list[Output], reason: str | None) -> dict[str, Any]:
        parser = ToolParser(self.box.schemas, self.box.several, whole=True)
        content, calls = "", list[dict[str, Any]]()
        for piece in (*parser.push(text), *parser.flush()):
            if isinstance(piece, TextPiece):
                content += piece.text
            elif isinstance(piece, CallBegins):
                calls.append(_call(piece.name))
            else:
                calls[-1]["function"]["arguments"] += piece.text
        choice = super().choice(index, content, outputs, _reason(parser, reason))
        if calls:
            choice["message"] |= {"content": content or None, "tool_calls": calls}
        return choice

    def event(self, index: int, output: Output) -> str:
        """Each piece is an event of its own, and so is the end."""
        self.generated += output.token is not None
        parser = self._parsers[index]
        pieces = parser.push(output.text)
        if output.finish_reason is not None:
            pieces += parser.flush()
        deltas = [_delta(piece) for piece in pieces]
        reason = output.finish_reason and _reason(parser, output.finish_reason)
        if reason is not None or (output.logprob is not None and not deltas):
            deltas.append({})
        logprobs, last, text = self._logprobs([output]), len(deltas) - 1, ""
        for i, delta in enumerate(deltas):
            choice = {"index": index, "delta": delta, "logprobs": None if i else logprobs, "finish_reason": None}
            text += event(self.chunk({**choice, "finish_reason": reason if i == last else None}))
        return text


def _reason(parser: ToolParser, reason: str | None) -> str | None:
    return "tool_calls" if reason == "stop" and parser.calls and not parser.broken else reason


def _call(name: str) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, TextPiece):
        return {"content": piece.text}
    if isinstance(piece, CallBegins):
        return {"tool_calls": [{"index": piece.index, **_call(piece.name)}]}
    assert isinstance(piece, ArgumentsPiece)
    return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
