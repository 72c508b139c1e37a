"""A real server over the eager engine: in this process for most tests, as a program for those of signals."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager

import uvicorn

from helpers.eager_bundle import eager_engine
from jet_export.bundle.limits import Limits
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.server.openai.app import create_app
from jet_export.server.openai.chat import ChatTemplate
from jet_export.server.openai.serve import KEEP_ALIVE, listen, run, url

LIMITS = Limits(max_batch_size=4, max_seq_len=400, prefill_chunk=64)
TEMPLATE = """{% for m in messages %}
{% if m['role'] == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}
<{{ m['role'] }}>{{ m['content'] }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def async_llm(**serving) -> AsyncLLM:
    return AsyncLLM.over(BatchingEngine(eager_engine(LIMITS), ByteTokenizer(), -1, Serving(**serving)))


@contextmanager
def server(llm: AsyncLLM, template: str | None = TEMPLATE, max_body_bytes: int | None = None):
    """The server's address."""
    app = create_app(llm, "mini", ChatTemplate(template, {}) if template else None, max_body_bytes)
    listener = listen("127.0.0.1", 0)
    program = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, timeout_keep_alive=75)
    )
    thread = threading.Thread(target=lambda: program.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        yield url(listener)
    finally:
        program.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    listener = listen("127.0.0.1", int(sys.argv[1]))
    print(url(listener), flush=True)
    llm = async_llm()
    keep_alive = float(sys.argv[3]) if len(sys.argv) > 3 else KEEP_ALIVE
    run(create_app(llm, "mini"), listener, llm.batching.close, grace=float(sys.argv[2]), keep_alive=keep_alive)
