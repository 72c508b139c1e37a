"""Responses in OpenAI's format: whole ones and the chunks of a stream, for completions and for chat."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from json.encoder import encode_basestring
from typing import Any

from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Logprob, Output
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer

DONE = "data: [DONE]\n\n"
_ANY_TEXT = "\0"


class Answer(ABC):
    """Collects the outputs of one HTTP request, prompt by prompt."""

    prefix: str
    whole: str  # the "object" field of a whole answer
    part: str  # the "object" field of a chunk

    n = 1  # answers to each prompt; `prompts` has each so many times, in a row

    def __init__(self, model: str, tokenizer: Tokenizer | ByteTokenizer, prompts: list[list[int]]) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.outputs: list[list[Output]] = [[] for _ in prompts]  # of a whole answer
        self.generated = 0  # tokens
        self.cached_tokens = 0  # of the prompts: the prefix cache had them
        self.reasons: dict[int, str] = {}  # finish reasons, by prompt, of those that have ended
        self._plain: dict[int, tuple[str, str]] = {}  # what surrounds the text in a chunk of nothing but text

    @abstractmethod
    def choice(self, index: int, text: str, outputs: list[Output], reason: str | None) -> dict[str, Any]:
        """One choice of a whole answer."""

    @abstractmethod
    def delta(self, index: int, output: Output) -> dict[str, Any]:
        """One choice of a chunk."""

    def opening(self) -> list[dict[str, Any]]:
        """Choices sent at the start of a stream."""
        return []

    def add(self, index: int, output: Output) -> None:
        """Towards the whole answer."""
        self.outputs[index].append(output)
        self.generated += output.token is not None

    def event(self, index: int, output: Output) -> str:
        """The server-sent event of an output; empty if it has nothing to tell."""
        self.generated += output.token is not None
        if output.logprob is not None or output.finish_reason is not None:
            return event(self.chunk(self.delta(index, output)))
        if not output.text:
            return ""
        if index not in self._plain:  # most events differ in their text only
            before, _, after = event(self.chunk(self.delta(index, Output(None, _ANY_TEXT)))).rpartition(
                encode(_ANY_TEXT)
            )
            self._plain[index] = before, after
        before, after = self._plain[index]
        return f"{before}{encode_basestring(output.text)}{after}"

    def result(self) -> dict[str, Any]:
        choices = [
            self.choice(i, "".join(o.text for o in outputs), outputs, outputs[-1].finish_reason)
            for i, outputs in enumerate(self.outputs)
        ]
        return {**self._head(self.whole), "choices": choices, "usage": self.usage()}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self.part), "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head(self.part), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(p) for p in self.prompts[:: self.n])
        generated = self.generated
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def ended(self, outputs: OutputStream) -> None:
        """Every prompt has ended."""
        self.cached_tokens = sum(outputs.cached[:: self.n])

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def encode(value: Any) -> str:
    """JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {encode(value)}\n\n"


class CompletionAnswer(Answer):
    """`echo[i]`: text that precedes the completion of prompt i; `scored`: with the log probabilities of its tokens.
    `empty`: the completion is left out, whatever token the engine made."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer | ByteTokenizer,
        prompts: list[list[int]],
        echo: list[str] | None,
        *,
        scored: bool = False,
        empty: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, prompts)
        self.echo, self.scored, self.empty = echo, scored, empty
        self.offsets = [0] * len(prompts)  # characters streamed so far, with log probabilities
        self._begun = [not scored] * len(prompts)  # the prompt has been streamed

    def opening(self) -> list[dict[str, Any]]:
        if self.scored:  # comes with its log probabilities
            return []
        return [_completion_choice(i, text, None, None) for i, text in enumerate(self.echo or [])]

    def add(self, index: int, output: Output) -> None:
        super().add(index, self._kept(output))

    def event(self, index: int, output: Output) -> str:
        return super().event(index, self._kept(output))

    def choice(self, index: int, text: str, outputs: list[Output], reason: str | None) -> dict[str, Any]:
        before = self.echo[index] if self.echo else ""
        rows = self._prompt_rows(index, outputs[0]) if self.scored else []
        return _completion_choice(index, before + text, self._logprobs(rows + self._rows(outputs), 0), reason)

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        text, rows = output.text, self._rows([output])
        if not self._begun[index]:
            self._begun[index] = True
            text, rows = (self.echo[index] if self.echo else "") + text, self._prompt_rows(index, output) + rows
        logprobs = self._logprobs(rows, self.offsets[index])
        self.offsets[index] += sum(len(token) for token, _ in rows)
        return _completion_choice(index, text, logprobs, output.finish_reason)

    def _kept(self, output: Output) -> Output:
        if not self.empty or output.token is None:
            return output
        return Output(None, "", None, output.finish_reason and "length", output.prompt_logprobs)

    def _rows(self, outputs: list[Output]) -> list[tuple[str, Logprob | None]]:
        return [(self.token_text(o.token), o.logprob) for o in outputs if o.token is not None and o.logprob]

    def _prompt_rows(self, index: int, output: Output) -> list[tuple[str, Logprob | None]]:
        """Of the prompt's tokens; nothing precedes the first."""
        texts = [self.token_text(t) for t in self.prompts[index]]
        return list(zip(texts, (None, *output.prompt_logprobs), strict=True))

    def _logprobs(self, scored: list[tuple[str, Logprob | None]], offset: int) -> dict[str, Any] | None:
        """text_offset counts the characters of the preceding tokens, without the prompt unless it is scored."""
        if not scored:
            return None
        offsets = []
        for text, _ in scored:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": [text for text, _ in scored],
            "token_logprobs": [p and p.chosen for _, p in scored],
            "top_logprobs": [p and {self.token_text(t): v for t, v in reversed(p.top)} for _, p in scored],
            "text_offset": offsets,
        }


def _completion_choice(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class ChatAnswer(Answer):
    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(len(self.prompts))]

    def choice(self, index: int, text: str, outputs: list[Output], reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(outputs), "finish_reason": reason}

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        delta = {"content": output.text} if output.text else {}
        logprobs = self._logprobs([output])
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": output.finish_reason}

    def _logprobs(self, outputs: list[Output]) -> dict[str, Any] | None:
        content = [
            {**self._scored(o.token, o.logprob.chosen), "top_logprobs": [self._scored(t, v) for t, v in o.logprob.top]}
            for o in outputs
            if o.token is not None and o.logprob
        ]
        return {"content": content} if content else None

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
