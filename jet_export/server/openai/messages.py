"""The messages and tools of a chat, as OpenAI's API has them and as a chat template reads them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jet_export.server.fields import Text

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]  # OpenAI's, and the dots of namespaces


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = None  # prefixes are cached where they are worth it


class CalledFunction(Strict):
    name: Text
    arguments: Text  # a JSON object


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self, where: str) -> dict[str, Any]:
        """With its arguments as an object, which templates expect. Raises ValueError, which begins with `where`."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"{where}.function.arguments: not a JSON object.")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None  # of an assistant's
    tool_call_id: Text | None = None  # of a tool's
    reasoning_content: Text | None = None  # an assistant's thinking; the template says which turns keep it
    reasoning: Text | None = None  # the same, as newer vLLM names it
    # What an answer has and the next prompt does not need; clients send answers back as they are.
    refusal: Text | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _belongs_to_its_role(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role} has no tool_calls")
        if self.role != "assistant" and (self.reasoning_content or self.reasoning):
            raise ValueError(f"a message of the role {self.role} has no reasoning_content")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a message of the role tool has a tool_call_id, and no other has")
        if self.content is None and not (self.tool_calls or self.reasoning_content or self.reasoning):
            raise ValueError("content is missing")
        return self

    def plain(self, where: str) -> dict[str, Any]:
        """As a chat template reads it. `where`: the field, for the ValueError of arguments that are no object."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(p.text for p in parts)
        calls = [c.plain(f"{where}.tool_calls.{i}") for i, c in enumerate(self.tool_calls or [])]
        more = {"name": self.name, "tool_call_id": self.tool_call_id, "tool_calls": calls}
        more["reasoning_content"] = self.reasoning_content or self.reasoning
        return {"role": self.role, "content": text, **{k: v for k, v in more.items() if v}}


class Function(Strict):
    """A function that the model may call. `parameters`: the JSON schema of its arguments, an object."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As a chat template reads it: what was given, in its order."""
        return self.model_dump(exclude_unset=True, exclude={"function": {"strict"}})


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    """tool_choice: this function is to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
