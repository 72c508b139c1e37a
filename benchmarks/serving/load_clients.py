"""Clients for load tests: an engine in this process, or an OpenAI-compatible server on loopback; both time tokens."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from serving_options import sampling_of

from jet_export.backends.base import Engine
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Params
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer

GREEDY = Params()


class Clock:
    """Seconds. With `cpu`, for a machine shared with other work: CPU time of this process, idle time added by `skip`.

    With a single-threaded engine in this process that is the time a core of its own would show.
    """

    def __init__(self) -> None:
        self.cpu, self.skipped = False, 0.0

    def now(self) -> float:
        return time.process_time() + self.skipped if self.cpu else time.perf_counter()

    def skip(self, until: float) -> None:
        self.skipped += max(0.0, until - self.now())


CLOCK = Clock()


@dataclass(frozen=True)
class LoadRequest:
    """One request: random token ids, and exactly `new` new tokens."""

    prompt: list[int]
    new: int
    params: Params = GREEDY  # how it is sampled


@dataclass
class Trace:
    """One answer: when the request was due, and when each token arrived (seconds on one clock)."""

    due: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0  # as the answer counts them
    ids: list[int] = field(default_factory=list)  # of the tokens, where the answer has them
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.due

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first."""
        return (self.times[-1] - self.times[0]) / max(self.tokens - 1, 1)


class Client(Protocol):
    async def run(self, request: LoadRequest, trace: Trace) -> None:
        """Send the request and record its tokens in `trace` as they arrive. Cancelling the task cancels the request."""


class InProcess:
    """`AsyncLLM` over an engine in this process."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | ByteTokenizer, serving: Serving) -> None:
        self.llm = AsyncLLM.over(BatchingEngine(engine, tokenizer, -1, serving))

    def __enter__(self) -> InProcess:
        self.llm.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.stop()

    async def run(self, request: LoadRequest, trace: Trace) -> None:
        params = replace(request.params, max_new_tokens=request.new, ignore_eos=True)
        stream = self.llm.stream([request.prompt], params)
        try:
            async for _, output in stream:
                if output.token is not None:
                    trace.times.append(CLOCK.now())
                    trace.tokens += 1
                    trace.ids.append(output.token)
                if output.finish_reason not in (None, "length"):
                    trace.error = str(output.finish_reason)
        finally:
            await stream.aclose()


class Http:
    """POST /v1/completions with stream: true. A token without text of its own arrives with the next one."""

    def __init__(self, url: str, model: str) -> None:
        import httpx

        self.url, self.model = url, model
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.AsyncClient(timeout=600, limits=limits)

    async def run(self, request: LoadRequest, trace: Trace) -> None:
        body = {
            "model": self.model,
            "prompt": request.prompt,
            "max_tokens": request.new,
            **sampling_of(request.params),
            "seed": request.params.sampling.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self.http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                trace.error = f"status {answer.status_code}"
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    self._record(json.loads(line[6:]), trace)

    def _record(self, event: dict[str, Any], trace: Trace) -> None:
        if "error" in event:
            trace.error = event["error"]["message"]
        elif event.get("usage"):
            trace.tokens = event["usage"]["completion_tokens"]
        else:
            trace.times.append(CLOCK.now())


@contextmanager
def http_server(bundle: Path, arguments: list[str]):
    """`jet-export serve --openai` in its own process, on a free port of loopback; yields Http's arguments."""
    args = [sys.executable, "-m", "jet_export.cli.app", "serve", str(bundle), "--openai", "--port", "0", *arguments]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url, model = "", ""
        for line in process.stdout:
            model = model or line.split(":")[0]
            if found := re.search(r"GET\s+(http://\S+)/v1/models", line):
                url = found[1]
                break
        if not url:
            sys.exit("jet-export serve ended before it answered.")
        yield url, model
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
