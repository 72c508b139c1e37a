"""A client of `jet-export serve BUNDLE`: streams over gRPC, or gets whole answers over HTTP.

    jet-export serve bundles/jet-tiny-fp8-inductor &
    python examples/triton_client.py "def mean(values):" --max-tokens 48
    python examples/triton_client.py "def mean(values):" --http 127.0.0.1:8000 --temperature 0.7 --seed 1

Several prompts run at once and their answers are printed at the end; a single one is streamed. Ctrl-C cancels.
Needs `pip install 'tritonclient[grpc]'`; HTTP needs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

DTYPES = {"text_input": "BYTES", "stream": "BOOL", "max_tokens": "INT32", "temperature": "FP32", "seed": "UINT64"}


def over_http(address: str, model: str, values: dict[str, Any]) -> dict[str, Any]:
    """One whole answer of the generate endpoint: outputs by name."""
    request = urllib.request.Request(
        f"http://{address}/v2/models/{model}/generate",
        data=json.dumps({**values, "exclude_input_in_output": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        raise SystemExit(f"refused: {e.read().decode(errors='replace')}") from None
    except urllib.error.URLError as e:
        raise SystemExit(f"http://{address}: {e.reason}. Is the server running?") from None


async def over_grpc(client: Any, model: str, values: dict[str, Any]) -> AsyncIterator[tuple[str, str | None]]:
    """Yield (new text, finish reason or None) as they arrive. Leaving the loop cancels the request."""
    import numpy as np
    from tritonclient.grpc import InferInput
    from tritonclient.utils import triton_to_np_dtype

    inputs = []
    for name, value in {**values, "stream": True}.items():
        kind = DTYPES[name]
        inputs.append(InferInput(name, [1], kind))
        inputs[-1].set_data_from_numpy(np.array([value], triton_to_np_dtype(kind)))

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": model, "inputs": inputs}

    async for result, error in client.stream_infer(requests()):
        if error:
            raise SystemExit(f"refused: {error.message()}")
        reason = result.as_numpy("finish_reason")
        text = result.as_numpy("text_output")[0].decode()
        yield text, None if reason is None else reason[0].decode()


async def stream(address: str, model: str, asked: list[dict[str, Any]]) -> None:
    from tritonclient.grpc.aio import InferenceServerClient

    async def one(values: dict[str, Any]) -> str:
        parts = []
        async for text, reason in over_grpc(client, model, values):
            parts.append(text)
            if len(asked) == 1:
                print(text, end="", flush=True)
            if reason and len(asked) == 1:
                print(f"\n[{reason}]", file=sys.stderr)
        return "".join(parts)

    async with InferenceServerClient(address) as client:
        answers = await asyncio.gather(*(one(values) for values in asked))
    if len(asked) > 1:
        print_answers(asked, answers)


def print_answers(asked: list[dict[str, Any]], answers: list[str]) -> None:
    for values, text in zip(asked, answers, strict=True):
        print(f"--- {values['text_input']}\n{text}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model", default="jet-tiny")
    parser.add_argument("--grpc", default="127.0.0.1:8001", metavar="HOST:PORT", help="stream over gRPC from here")
    parser.add_argument("--http", metavar="HOST:PORT", help="get whole answers over HTTP from here instead")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    shared = {"max_tokens": given.max_tokens, "temperature": given.temperature, "seed": given.seed}
    asked = [{"text_input": prompt, **shared} for prompt in given.prompts]
    if given.http:
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda values: over_http(given.http, given.model, values), asked))
        print_answers(asked, [answer["text_output"] for answer in answers])
    else:
        try:
            asyncio.run(stream(given.grpc, given.model, asked))
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
