"""jet-tiny on the eager engine as the replica of a fleet, for tests on Ray's own cluster: nothing is compiled.

A step takes STEP seconds at least, so that a test can act while requests run, whatever the machine is doing."""

import time
from collections.abc import Callable

from helpers.eager_tiny import tiny_engine
from jet_export.model.hub import JET_TINY_DIR
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.tokenizer import load_tokenizer

STEP = 0.03


class SlowEngine(BatchingEngine):
    def step(self) -> bool:
        if self.sequences:
            time.sleep(STEP)
        return super().step()


def load() -> AsyncLLM:
    serving = Serving(slots=4, max_waiting=4, prefix_cache_bytes=1 << 24)
    return AsyncLLM.over(SlowEngine(tiny_engine(), load_tokenizer(JET_TINY_DIR), -1, serving))


LOAD: Callable[[], AsyncLLM] = load
