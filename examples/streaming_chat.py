"""A chat in the terminal with any server of OpenAI's API, by the openai client; answers are streamed.

    jet-export serve bundles/jet-2b-fp8-inductor --openai &
    python examples/streaming_chat.py

A line is a message; an empty one ends the chat. The key, where the server asks for one, is $JET_API_KEY.
Every turn sends the whole conversation: the server's prefix cache has the states of what it has seen.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from openai import OpenAI


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="by default the server's first")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7)
    given = parser.parse_args(arguments)

    client: Any = OpenAI(base_url=given.url, api_key=os.environ.get("JET_API_KEY", "none"))
    model = given.model or client.models.list().data[0].id
    messages: list[Any] = []
    for line in sys.stdin:
        if not line.strip():
            break
        messages.append({"role": "user", "content": line.strip()})
        answer = ""
        for chunk in client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=given.max_tokens,
            temperature=given.temperature,
            stream=True,
        ):
            text = chunk.choices[0].delta.content or ""
            print(text, end="", flush=True)
            answer += text
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
