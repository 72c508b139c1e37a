"""A model's thinking, apart from its answer, as its text arrives: `<think>`, what it thinks, `</think>`, the answer.

Qwen3's template has the model open its thinking, Qwen3.5's opens it in the prompt, and both close it there where
thinking is off. The whitespace around the marks belongs to neither part. What is cut off before `</think>` is all
thinking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jet_export.runtime.params import Output
from jet_export.server.openai.answers import ChatAnswer, event
from jet_export.server.openai.tool_answers import ToolAnswer

BEGIN, END = "<think>", "</think>"


def opens(prompt: str) -> bool:
    """Whether a prompt ends in thinking that its answer goes on with."""
    return prompt.rstrip().endswith(BEGIN)


class Parts(NamedTuple):
    reasoning: str
    content: str


class ReasoningParser:
    """Of one answer. `opened`: the prompt has opened its thinking. The parts of a stream add up to those of the whole
    text, however it is cut."""

    def __init__(self, opened: bool) -> None:
        self._held = ""  # not decided yet
        self._step: Callable[[], Parts] = self._thinking if opened else self._beginning
        self._begun = False  # the thinking has had its first character

    def push(self, text: str) -> Parts:
        """What is final with this text."""
        self._held += text
        return self._step()

    def flush(self) -> Parts:
        """What is left at the end of the answer."""
        rest, self._held = self._held, ""
        if self._step == self._thinking:  # whitespace, or the beginning of a mark that did not come
            return Parts(rest.rstrip() if self._begun else rest.strip(), "")
        return Parts("", "" if self._step == self._between else rest)

    def _beginning(self) -> Parts:
        """An answer may begin with the mark, whitespace before it or not."""
        text = self._held.lstrip()
        if text.startswith(BEGIN):
            self._held, self._step = text[len(BEGIN) :], self._thinking
            return self._step()
        if not BEGIN.startswith(text):
            self._step = self._answer
        return self._step() if self._step == self._answer else Parts("", "")

    def _thinking(self) -> Parts:
        text, found, rest = self._held.partition(END)
        if found:
            self._held, self._step = rest, self._between
            reasoning = text.rstrip() if self._begun else text.strip()
            return Parts(reasoning, self._step().content)
        keep = next((n for n in range(len(END) - 1, 0, -1) if text.endswith(END[:n])), 0)
        at = len(text[: len(text) - keep].rstrip())  # whitespace in front of the mark is not thinking
        text, self._held = text[:at], text[at:]
        if not self._begun:
            text = text.lstrip()
        self._begun |= bool(text)
        return Parts(text, "")

    def _between(self) -> Parts:
        """Behind the thinking, and before the answer's first character."""
        self._held = self._held.lstrip()
        if self._held:
            self._step = self._answer
        return self._step() if self._held else Parts("", "")

    def _answer(self) -> Parts:
        text, self._held = self._held, ""
        return Parts("", text)


class _Reasoning(ChatAnswer):
    """A chat answer whose thinking is `reasoning_content`, beside the content that the rest is made of."""

    opened = False

    def choice(self, index: int, text: str, outputs: list[Output], reason: str | None) -> dict[str, Any]:
        parser = ReasoningParser(self.opened)
        parts = parser.push(text), parser.flush()
        content = "".join(p.content for p in parts)
        choice = super().choice(index, content, outputs, reason)
        reasoning = "".join(p.reasoning for p in parts)
        choice["message"]["reasoning_content"] = reasoning or None
        if reasoning and not content:
            choice["message"]["content"] = None
        return choice

    def event(self, index: int, output: Output) -> str:
        parser = self._reasoning[index]
        parts: Sequence[Parts] = [parser.push(output.text)]
        if output.finish_reason is not None:
            parts = [*parts, parser.flush()]
        reasoning, content = ("".join(texts) for texts in zip(*parts, strict=True))
        if not reasoning:
            return super().event(index, replace(output, text=content))
        self.generated += output.token is not None
        delta = {"reasoning_content": reasoning}
        logprobs = self._logprobs([output])
        text = event(self.chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}))
        if content or output.finish_reason is not None:
            text += super().event(index, Output(None, content, None, output.finish_reason))
        return text

    def think(self, opened: bool) -> None:
        """Before the answer begins. `opened`: see `opens`."""
        self.opened = opened
        self._reasoning = [ReasoningParser(opened) for _ in self.prompts]


class ReasoningAnswer(_Reasoning):
    pass


class ReasoningToolAnswer(_Reasoning, ToolAnswer):
    """Calls are looked for behind the thinking only."""
