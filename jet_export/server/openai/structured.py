"""The fields of a request that ask for structured output: OpenAI's response_format, vLLM's structured_outputs and its
older guided_*, SGLang's json_schema, regex and ebnf. One of them may be given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jet_export.runtime.grammar import Grammar
from jet_export.server.fields import Text
from jet_export.utils.errors import JetExportError

Schema = dict[str, Any] | bool | Text


class JsonSchema(BaseModel):
    """`strict` false would allow other answers; here an answer always follows the schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise JetExportError('response_format: json_schema goes with the type "json_schema", and only with it.')
        if self.json_schema is not None:
            schema = self.json_schema.schema_
            return Grammar.json_object() if schema is None else Grammar.json_schema(schema)
        return Grammar.json_object() if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None


class StructuredFields(BaseModel):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None
    json_schema: Schema | None = None
    regex: Text | None = None
    ebnf: Text | None = None

    def grammar(self) -> Grammar | None:
        """What the answer has to match. Raises JetExportError for more than one, and as Grammar does."""
        found = {name: value for name, value in self._asked().items() if value is not None}
        if len(found) > 1:
            raise JetExportError(f"{' and '.join(found)}: an answer follows one of them.", "Give one.")
        for name, value in found.items():
            return MAKERS[name.rpartition(".")[2].removeprefix("guided_")](value)
        return None

    def _asked(self) -> dict[str, Any]:
        """By the name of the field; a response_format of text asks for nothing."""
        form, s = self.response_format, self.structured_outputs or StructuredOutputs()
        values = {name: getattr(self, name) for name in StructuredFields.model_fields if name in _OWN}
        values |= {f"structured_outputs.{k.rstrip('_')}": getattr(s, k) for k in StructuredOutputs.model_fields}
        values["structured_outputs.json_object"] = s.json_object or None
        return {**values, "response_format": None if form is None or form.type == "text" else form}


_OWN = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema", "regex", "ebnf")
MAKERS: dict[str, Callable[[Any], Grammar | None]] = {
    "response_format": ResponseFormat.grammar,
    "json": Grammar.json_schema,
    "json_schema": Grammar.json_schema,
    "json_object": lambda _: Grammar.json_object(),
    "regex": Grammar.regex,
    "choice": Grammar.choice,
    "grammar": Grammar.lark,
    "ebnf": Grammar.lark,
}
