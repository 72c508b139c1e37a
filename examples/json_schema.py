"""Structured output: an answer that follows a JSON schema, by the openai client.

    jet-export serve bundles/jet-2b-fp8-inductor --openai &
    python examples/json_schema.py "A book by Ursula K. Le Guin:"

The server masks the tokens that the schema does not allow, so that what comes can always be parsed. With LLM in Python:
`llm.generate(prompt, grammar=Grammar(...))`.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from openai import OpenAI

BOOK = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "year": {"type": "integer", "minimum": 1450, "maximum": 2100},
        "genre": {"enum": ["novel", "stories", "poems", "essays"]},
    },
    "required": ["title", "year", "genre"],
    "additionalProperties": False,
}


def ask(client: OpenAI, model: str, prompt: str, schema: dict[str, Any], seed: int) -> Any:
    """The answer, parsed."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        response_format=form,
        max_tokens=200,
        seed=seed,
    )
    return json.loads(answer.choices[0].message.content or "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    client = OpenAI(base_url=given.url, api_key=os.environ.get("JET_API_KEY", "none"))
    print(json.dumps(ask(client, client.models.list().data[0].id, given.prompt, BOOK, given.seed), indent=2))


if __name__ == "__main__":
    main()
