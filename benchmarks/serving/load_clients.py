"""Who asks: an engine in this process, or an OpenAI-compatible server on loopback; both give the times of tokens."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jet_export.backends.base import Engine
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Params
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer


class Clock:
    """Seconds. On a machine with other work, `cpu` counts this process's CPU time instead, idle time skipped by `skip`:
    with an engine of one thread in this process, what a core of its own would show."""

    def __init__(self) -> None:
        self.cpu, self.skipped = False, 0.0

    def now(self) -> float:
        return time.process_time() + self.skipped if self.cpu else time.perf_counter()

    def skip(self, until: float) -> None:
        self.skipped += max(0.0, until - self.now())


CLOCK = Clock()


@dataclass(frozen=True)
class Ask:
    """One request: random token ids, greedy, and exactly so many new tokens."""

    prompt: list[int]
    new: int


@dataclass
class Trace:
    """One answer: when it was due, and when each token came (seconds of one clock)."""

    due: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0  # by the answer's own count
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.due

    @property
    def tpot(self) -> float:
        """Mean seconds a token after the first."""
        return (self.times[-1] - self.times[0]) / max(self.tokens - 1, 1)


class Client(Protocol):
    async def run(self, ask: Ask, trace: Trace) -> None:
        """Ask and wait; tokens are noted in `trace` as they come. Cancelling the task cancels the request."""


class InProcess:
    """`AsyncLLM` over an engine, its thread beside this one."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | ByteTokenizer, serving: Serving) -> None:
        self.llm = AsyncLLM.over(BatchingEngine(engine, tokenizer, -1, serving))

    def __enter__(self) -> InProcess:
        self.llm.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.stop()

    async def run(self, ask: Ask, trace: Trace) -> None:
        stream = self.llm.stream([ask.prompt], Params(ask.new, ignore_eos=True))
        try:
            async for _, output in stream:
                if output.token is not None:
                    trace.times.append(CLOCK.now())
                    trace.tokens += 1
                if output.finish_reason not in (None, "length"):
                    trace.error = str(output.finish_reason)
        finally:
            await stream.aclose()


class Http:
    """POST /v1/completions with stream: true. Tokens without text of their own come with the next one's."""

    def __init__(self, url: str, model: str) -> None:
        import httpx

        self.url, self.model = url, model
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.AsyncClient(timeout=600, limits=limits)

    async def run(self, ask: Ask, trace: Trace) -> None:
        body = {"model": self.model, "prompt": ask.prompt, "max_tokens": ask.new, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        async with self.http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                trace.error = f"status {answer.status_code}"
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    self._note(json.loads(line[6:]), trace)

    def _note(self, event: dict[str, Any], trace: Trace) -> None:
        if "error" in event:
            trace.error = event["error"]["message"]
        elif event.get("usage"):
            trace.tokens = event["usage"]["completion_tokens"]
        else:
            trace.times.append(CLOCK.now())


@contextmanager
def http_server(bundle: Path, serving: Serving):
    """`jet-export serve` in a process of its own, on a free port of loopback; gives a client's arguments."""
    args = [sys.executable, "-m", "jet_export.cli.app", "serve", str(bundle), "--openai", "--port", "0",
            "--max-waiting", str(serving.max_waiting), "--wait-timeout", str(serving.wait_timeout),
            "--prefix-cache-bytes", str(serving.prefix_cache_bytes)]  # fmt: skip
    for option, value in (("--slots", serving.slots), ("--token-budget", serving.token_budget)):
        args += [option, str(value)] if value is not None else []
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
