"""What an event of a stream costs the servers' processes in CPU time, with an engine that only emits tokens.

    python benchmarks/serving/frontend_cost.py [--frontends 2] [--streams 64] [--step-ms 3.4] [--tokenizer DIR]

The engine gives every stream a token a step and is otherwise idle; the streams are read in this process. CPU time of
the engine's process and of its front ends over the events read; the rate says only whether the machine kept up.
--frontends 0: everything in the engine's process. --tokenizer: of a checkpoint or a bundle; default: bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from jet_export.runtime.params import Output, Params
from jet_export.runtime.serving_engine import RequestLimits
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.server.openai.app import create_app
from jet_export.server.openai.frontend import FrontEndConfig
from jet_export.server.openai.http import http_server, listen, listen_too, raise_file_limit, run_server, url
from jet_export.server.openai.options import ApiOptions
from jet_export.server.openai.supervisor import FrontEnds

LIMITS = RequestLimits(slots=4096, max_waiting=4096, max_seq_len=1 << 20)
VOCAB = 1 << 20
TEXT = " The quick brown fox jumps over the lazy dog."
TICK = os.sysconf("SC_CLK_TCK")


class Sequence:
    """A stream that gets `left` more tokens."""

    cached_tokens = 0
    snapshot = None

    def __init__(self, left: int, on_output: Any) -> None:
        self.left, self.on_output = left, on_output
        self.tokens: list[int] = []
        self.finish_reason: str | None = None


class TokenSource:
    """BatchingEngine as the servers see it: a step every `step` seconds, which waits and does not compute."""

    def __init__(self, step: float, tokenizer: Any) -> None:
        self.step_seconds, self.tokenizer = step, tokenizer
        self.text: list[int] = tokenizer.encode(TEXT)
        self.lock = threading.RLock()
        self.running: list[Sequence] = []
        self.delivering, self.stopping = False, False
        self.after_step: Any = lambda: None
        capacity = SimpleNamespace(**LIMITS._asdict(), longest=LIMITS.max_seq_len)
        self.scheduler = SimpleNamespace(capacity=capacity)
        self.engine = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB))
        self.thread = threading.Thread(target=self.loop, daemon=True)

    def submit(self, prompt: list[int], params: Params, on_output: Any, **_: Any) -> Sequence:
        with self.lock:
            self.running.append(Sequence(params.max_new_tokens, on_output))
            return self.running[-1]

    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
        with self.lock:
            if sequence.finish_reason is None:
                self.end(sequence, Output(None, finish_reason=reason))

    def end(self, sequence: Sequence, last: Output) -> None:
        sequence.finish_reason = last.finish_reason
        self.running.remove(sequence)
        sequence.on_output(last)

    def loop(self) -> None:
        next_step = time.perf_counter()
        while not self.stopping:
            next_step = max(next_step + self.step_seconds, time.perf_counter())
            time.sleep(max(0.0, next_step - time.perf_counter()))
            with self.lock:
                self.delivering = True
                for sequence in list(self.running):
                    token = self.text[len(sequence.tokens) % len(self.text)]
                    sequence.tokens.append(token)
                    sequence.left -= 1
                    if sequence.left:
                        sequence.on_output(Output(token))
                    else:
                        self.end(sequence, Output(token, finish_reason="length"))
                self.delivering = False
                self.after_step()

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        with self.lock:
            self.stopping = True
            for sequence in list(self.running):
                self.cancel(sequence)

    def stop(self) -> None:
        self.close()
        self.thread.join()

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and not self.stopping

    def render_metrics(self) -> str:
        return "\n"


def serve(options: argparse.Namespace) -> None:
    """The server, in a process of its own."""
    from jet_export.runtime.async_llm import AsyncLLM

    raise_file_limit(print)
    source = cast(Any, TokenSource(options.step_ms / 1e3, load_tokenizer(options.tokenizer)))
    listener = listen("127.0.0.1", 0)
    address = url(listener)
    if not options.frontends:
        print(address, flush=True)
        run_server(
            http_server(create_app(AsyncLLM.over(source), ApiOptions(names=("stub",))), close=source.close), listener
        )
        return
    listeners = [listener, *(listen_too(listener) for _ in range(options.frontends - 1))]
    config = FrontEndConfig(
        options=ApiOptions(names=("stub",)), bundle=str(options.tokenizer), limits=LIMITS, vocab_size=VOCAB
    )
    FrontEnds(source, listeners, config).run(lambda: print(address, flush=True))


class Reader(asyncio.Protocol):
    """One stream after another on one connection; counts events."""

    def __init__(self, request: bytes, rounds: int) -> None:
        self.request, self.rounds, self.events, self.end = request, rounds, 0, b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: {")
        self.end = (self.end + data)[-7:]
        if self.end == b"\r\n0\r\n\r\n":
            self.rounds, self.end = self.rounds - 1, b""
            if self.rounds:
                self.transport.write(self.request)
            else:
                self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("closed early"))


async def read(port: int, streams: int, rounds: int, tokens: int) -> int:
    """The events of all streams."""
    values = {"model": "stub", "prompt": [1], "max_tokens": tokens, "temperature": 0, "stream": True}
    content = json.dumps(values)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode()
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Reader(request, rounds), "127.0.0.1", port) for _ in range(streams)]
    await asyncio.gather(*(reader.done for _, reader in made))
    for transport, _ in made:
        transport.close()
    return sum(reader.events for _, reader in made)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frontends", type=int, default=2)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--step-ms", type=float, default=3.4)
    parser.add_argument("--tokenizer", type=Path, default=Path("."))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    raise_file_limit(print)
    server = subprocess.Popen([sys.executable, *sys.argv, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().rsplit(":", 1)[1])
        time.sleep(1)  # start-up is not part of it
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        pids = [server.pid, *map(int, children)]
        before, start = [cpu_seconds(pid) for pid in pids], time.perf_counter()
        events = asyncio.run(read(port, options.streams, options.rounds, options.tokens))
        seconds = time.perf_counter() - start
        engine, *ends = (1e6 * (cpu_seconds(pid) - b) / events for pid, b in zip(pids, before, strict=True))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    row = {
        "frontends": options.frontends,
        "streams": options.streams,
        "events": events,
        "events_per_s": round(events / seconds),
        "engine_us_per_event": round(engine, 1),
        "front_ends_us_per_event": round(sum(ends), 1),
    }
    print(json.dumps(row))
    if options.output:
        from jet_export.utils.environment import write_result

        write_result(options.output, row)


if __name__ == "__main__":
    main()
