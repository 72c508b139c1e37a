"""A real server over the eager engine: in this process for most tests, as a program for those of signals."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import httpx
import torch

from helpers.eager_bundle import eager_engine
from helpers.paths import TESTS
from jet_export.bundle.limits import Limits
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.server.openai.app import create_app
from jet_export.server.openai.chat import ChatTemplate
from jet_export.server.openai.frontend import FrontEndConfig
from jet_export.server.openai.http import (
    KEEP_ALIVE,
    Tls,
    http_server,
    listen,
    listen_too,
    raise_file_limit,
    run_server,
    url,
)
from jet_export.server.openai.options import API_KEY, ApiOptions
from jet_export.server.openai.supervisor import FrontEnds

LIMITS = Limits(max_batch_size=4, max_seq_len=400, prefill_chunk=64)
TEMPLATE = """{% for m in messages %}
{% if m['role'] == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}
<{{ m['role'] }}>{{ m['content'] }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def async_llm(limits: Limits = LIMITS, **serving) -> AsyncLLM:
    return AsyncLLM.over(BatchingEngine(eager_engine(limits), ByteTokenizer(), -1, Serving(**serving)))


@contextmanager
def server(
    llm: AsyncLLM,
    template: str | None = TEMPLATE,
    keep_alive: float = KEEP_ALIVE,
    tls: Tls | None = None,
    tokenizer_config: dict | None = None,
    **options,
):
    """The server's address. `options`: of ApiOptions."""
    options.setdefault("names", ("mini",))
    app = create_app(llm, ApiOptions(**options), ChatTemplate(template, {}) if template else None, tokenizer_config)
    listener = listen("127.0.0.1", 0)
    uvicorn = http_server(app, keep_alive=keep_alive, grace=1, close=llm.batching.close, tls=tls)
    thread = threading.Thread(target=lambda: uvicorn.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        yield url(listener, tls)
    finally:
        uvicorn.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def program(*options: str, inside: Callable[..., list[str]] = lambda *command: [*command]):
    """(process, address) of this file as a program, once it answers; it is killed at the end. `inside`: of its command,
    one that runs it elsewhere."""
    command = inside(sys.executable, "-m", "helpers.serving", *options)
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, process.communicate()[1]
        wait_until(lambda: answers(address))
        yield process, address
    finally:
        process.kill()
        process.communicate()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def main(port: int, grace: float, keep_alive: float, frontends: int, directory: str, batch: int) -> None:
    """`directory`: of the chat template, with front ends."""
    torch.set_num_threads(1)
    raise_file_limit(print)
    listener = listen("127.0.0.1", port)
    address = url(listener)
    llm = async_llm(replace(LIMITS, max_batch_size=batch))
    if not frontends:
        print(address, flush=True)
        app = create_app(llm, ApiOptions(names=("mini",)))
        server = http_server(app, grace=grace, keep_alive=keep_alive, close=llm.batching.close)
        run_server(server, listener)
        return
    config = FrontEndConfig(
        options=ApiOptions(names=("mini",), api_key=os.environ.get(API_KEY)),
        bundle=directory,
        limits=llm.limits,
        vocab_size=llm.engine.config.vocab_size,
        keep_alive=keep_alive,
        grace=grace,
    )
    listeners = [listener, *(listen_too(listener) for _ in range(frontends - 1))]
    FrontEnds(llm.batching, listeners, config).run(lambda: print(address, flush=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("grace", type=float)
    parser.add_argument("keep_alive", type=float, nargs="?", default=KEEP_ALIVE)
    parser.add_argument("--frontends", type=int, default=0)
    parser.add_argument("--directory", default="")
    parser.add_argument("--batch", type=int, default=LIMITS.max_batch_size)
    main(**vars(parser.parse_args()))
