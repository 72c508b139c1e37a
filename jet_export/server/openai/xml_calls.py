"""The arguments of a function call in the format that Qwen3-Coder's and Qwen3.5's chat templates teach, as JSON:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A value is text; the function's JSON schema says which values are numbers, objects and the like, which are spelled as
JSON. One line break behind `<parameter=KEY>` and one before `</parameter>` belong to the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

HEADER = re.compile(r"\s*<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>")
_CLOSED = re.compile(r"</parameter>\s*(?=<parameter=|</function>|</tool_call>)")  # a value may hold </parameter>
_OPEN, _FUNCTION_END, _CALL_END = "<parameter=", "</function>", "</tool_call>"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
}


class Status(Enum):
    OPEN = auto()  # more is to come
    DONE = auto()
    BROKEN = auto()  # not in the format


class XmlArguments:
    """Of one call. `schema`: of its arguments, an object."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        properties = schema.get("properties")
        self.properties: Mapping[str, Any] = properties if isinstance(properties, dict) else {}
        self.status = Status.OPEN
        self._keys: set[str] = set()

    def take(self, text: str) -> tuple[str, str]:
        """(JSON that is final with the text behind the last, what of the text is not decided yet)."""
        made = ""
        while self.status is Status.OPEN:
            text = text.lstrip()
            if text.startswith((_FUNCTION_END, _CALL_END)):
                made += "}" if self._keys else "{}"
                self.status = Status.DONE
                return made, text.removeprefix(_FUNCTION_END)
            opened = _PARAMETER.match(text)
            closed = opened and _CLOSED.search(text, opened.end())
            if opened and closed:
                made += self._spelled(opened[1].strip(), text[opened.end() : closed.start()])
                text = text[closed.end() :]
            elif opened or any(tag.startswith(text) for tag in (_OPEN, _FUNCTION_END, _CALL_END)):
                break
            elif not (text.startswith(_OPEN) and ">" not in text and "\n" not in text):
                self.status = Status.BROKEN
            else:
                break
        return made, text

    def _spelled(self, key: str, value: str) -> str:
        if key in self._keys:  # an object has a key once
            self.status = Status.BROKEN
            return ""
        value = value.removeprefix("\n").removesuffix("\n")
        start = ", " if self._keys else "{"
        self._keys.add(key)
        return f"{start}{json.dumps(key, ensure_ascii=False)}: {spelled(value, self.properties.get(key))}"


def spelled(value: str, schema: Any) -> str:
    """The JSON of a value of this schema: text, unless the schema has it otherwise and it is that."""
    try:
        other: Any = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(other if _may_be(other, schema) else value, ensure_ascii=False)


def _may_be(value: Any, schema: Any) -> bool:
    """Whether a schema names the value's type, strings apart."""
    if not isinstance(schema, dict):
        return False
    choices = [*_listed(schema.get("anyOf")), *_listed(schema.get("oneOf"))]
    if any(_may_be(value, choice) for choice in choices):
        return True
    if any(not isinstance(v, str) and v == value and type(v) is type(value) for v in _listed(schema.get("enum"))):
        return True
    named = schema.get("type")
    for name in named if isinstance(named, list) else [named]:
        kind = _TYPES.get(name) if isinstance(name, str) else None
        if kind is not None and isinstance(value, kind) and (name == "boolean" or not isinstance(value, bool)):
            return True
    return False


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refuse(constant: str) -> None:
    raise ValueError(constant)
