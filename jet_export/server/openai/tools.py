"""tools and tool_choice of a chat: which functions the model may call, and what it is told of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jet_export.runtime.grammar import Grammar
from jet_export.server.openai.messages import NamedTool, Tool, ToolChoice

MAX_TOOLS = 128  # OpenAI's


@dataclass(frozen=True)
class Toolbox:
    """The functions of a request. `required`: the answer is calls and nothing else. Empty: none may be called."""

    shown: tuple[Tool, ...] = ()  # to the model
    tools: tuple[Tool, ...] = ()  # that it may call
    required: bool = False
    several: bool = True  # calls in an answer

    @classmethod
    def of(cls, tools: Sequence[Tool], choice: ToolChoice | None, several: bool) -> Toolbox:
        """Raises ValueError, which names the field."""
        if len(tools) > MAX_TOOLS:
            raise ValueError(f"tools: {len(tools)} functions; at most {MAX_TOOLS}.")
        names = [t.function.name for t in tools]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise ValueError(f"tools: there are two functions {twice!r}.")
        if choice == "none":
            return cls()
        if isinstance(choice, NamedTool):
            named = tuple(t for t in tools if t.function.name == choice.function.name)
            if not named:
                raise ValueError(f"tool_choice: {choice.function.name!r} is not one of tools.")
            return cls(tuple(tools), named, True, False)
        if choice == "required" and not tools:
            raise ValueError("tool_choice: required needs tools.")
        return cls(tuple(tools), tuple(tools), choice == "required", several)

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """Of the arguments of the functions that it may call, by name."""
        return {t.function.name: t.function.parameters or {} for t in self.tools}

    def described(self) -> list[dict[str, Any]]:
        """For the chat template."""
        return [t.plain() for t in self.shown]

    def grammar(self) -> Grammar | None:
        """Of an answer that has to call a function, or may call a `strict` one, whose arguments then follow its
        schema; None if it may be anything. The arguments' schemas are documents of their own, in which references
        resolve."""
        strict = any(t.function.strict for t in self.tools)
        if not self.required and not strict:
            return None
        calls = []
        for tool in self.tools:
            begin = '<tool_call>\n{"name": ' + json.dumps(tool.function.name) + ', "arguments": '
            schema = (tool.function.parameters if self.required or tool.function.strict else None) or {}
            calls.append((begin, {"type": "object", **schema}, "}\n</tool_call>"))
        return Grammar.tagged(calls, several=self.several, free=not self.required)
