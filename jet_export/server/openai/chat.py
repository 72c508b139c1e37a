"""A tokenizer's chat template, which turns messages into the text of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jet_export.model.hf_files import tokenizer_directory
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer
from jet_export.utils.errors import JetExportError
from jet_export.utils.schema import read_json_object


class ChatTemplate:
    """`chat_template` of a tokenizer_config.json, or a chat_template.jinja, in Hugging Face's dialect of Jinja."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.meta import find_undeclared_variables
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _tojson
        self.source, self.special = source, special
        self.knows_developers = "developer" in source
        try:
            self.template = environment.from_string(source)
            self.takes_tools = "tools" in find_undeclared_variables(environment.parse(source))
        except TemplateError as e:
            raise JetExportError(f"The tokenizer's chat template is no template ({e}).") from None

    def __call__(
        self,
        messages: list[dict[str, Any]],
        generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """The text, up to where the answer begins. `tools`: JSON schemas of functions. `more`: other variables of the
        template, such as Qwen's enable_thinking.

        Raises JetExportError if the template refuses the messages, or has no place for tools."""
        from jinja2 import TemplateError

        if tools and not self.takes_tools:
            raise JetExportError("tools: the chat template has no place for them.", "Use --chat-template with one.")
        if not self.knows_developers:  # such as Qwen's, which would leave them out
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        values = {"messages": messages, "tools": tools or None, "add_generation_prompt": generation_prompt}
        taken = sorted((values.keys() | self.special.keys()) & (more or {}).keys())
        if taken:
            raise JetExportError(f"chat_template_kwargs.{taken[0]}: set by the request or the tokenizer.")
        try:
            return self.template.render({**(more or {}), **values, **self.special})
        except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as e:
            raise JetExportError(f"The chat template refuses these messages: {e}.") from None

    def turn_ends(self, tokenizer: Tokenizer | ByteTokenizer) -> tuple[int, ...]:
        """The special token that the template puts behind an answer, such as <|im_end|>; empty if it puts none."""
        answer = "A"
        try:
            text = self([{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}], False)
        except JetExportError:
            return ()
        _, found, rest = text.rpartition(answer)
        ids = tokenizer.encode(rest, special_tokens=False) if found else []
        return tuple(i for i in ids[:1] if i in tokenizer.special_ids)


def _tojson(value: Any, indent: int | None = None) -> str:
    """As transformers has it: Jinja's own escapes HTML and sorts the keys."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def load_tokenizer_config(directory: str | Path) -> dict[str, Any]:
    """tokenizer_config.json; empty without one."""
    return read_json_object(tokenizer_directory(directory) / "tokenizer_config.json")


def load_chat_template(directory: str | Path, file: str | None = None) -> ChatTemplate | None:
    """The chat template of a bundle's tokenizer, or None; `file` is one to use instead.

    Raises JetExportError if there is no such file, or it has no template."""
    config = load_tokenizer_config(directory)
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = [t for t in source if isinstance(t, dict) and t.get("name") == "default"]
        source = named[0].get("template") if named else None
    path = Path(file) if file else tokenizer_directory(directory) / "chat_template.jinja"
    if file or path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise JetExportError(f"--chat-template {path}: {e}.", "Give a file with a Jinja template.") from None
    if not source or not isinstance(source, str):
        return None
    special = {
        k: _text(v) for k, v in config.items() if k in ("bos_token", "eos_token", "pad_token", "unk_token") and v
    }
    return ChatTemplate(source, special)


def _text(token: Any) -> str:
    return token if isinstance(token, str) else str(token.get("content", "")) if isinstance(token, dict) else ""
