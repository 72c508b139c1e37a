"""A replica: one engine in a process of its own, on one GPU. Nothing here needs Ray; app.py deploys it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable

from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.scheduler import QueueFull
from jet_export.server.ray.call import Call, Outputs, Refusal
from jet_export.utils.errors import JetExportError

COALESCE = 0.02  # seconds: tokens of a stream that come within it travel together, behind the first
REPORT = 1.0  # seconds between two reports of the metrics
STUCK = 60.0  # seconds without a step while requests run: the replica is replaced


class EngineReplica:
    """`make`: loads the engine. `report`: gets the metrics every REPORT seconds, from a thread."""

    def __init__(
        self,
        make: Callable[[], AsyncLLM],
        report: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.llm, self.clock = make(), clock
        self.llm.start()
        self._progress = (-1, clock())  # steps, and when they were seen
        if report is not None:
            threading.Thread(target=self._reports, args=(report,), daemon=True).start()

    async def generate(self, call: Call) -> AsyncGenerator[Outputs | Refusal, None]:
        """The outputs of the call's prompts; closing the iterator cancels those that have not ended."""
        prompts = [p for p in call.prompts for _ in range(call.params.n)]
        outputs = None
        try:
            try:
                outputs = self.llm.submit(prompts, call.params)
                batch = await outputs.batch()
            except JetExportError as e:
                yield Refusal(message=str(e), queue_full=isinstance(e, QueueFull))
                return
            while batch:
                yield Outputs(outputs=batch, cached=outputs.cached)
                if not outputs.closed:
                    await asyncio.sleep(COALESCE)
                batch = await outputs.batch()
        finally:
            if outputs is not None:
                outputs.close()

    def check_health(self) -> None:
        """Raises RuntimeError if the engine has stopped or takes no steps; Ray Serve then replaces the replica."""
        batching, now = self.llm.batching, self.clock()
        if not batching.alive:
            raise RuntimeError("The engine has stopped.")
        steps, since = batching.metrics.steps, self._progress[1]
        if steps != self._progress[0] or not batching.sequences:
            self._progress = (steps, now)
        elif now - since > STUCK:
            raise RuntimeError(f"Requests run, and no step has ended for {now - since:.0f} s.")

    def kv_used(self) -> float:
        """The share of the KV pages that requests hold."""
        scheduler = self.llm.batching.scheduler
        return scheduler.memory.requests_pages / max(1, scheduler.pages.size)

    def stop(self) -> None:
        self.llm.stop()

    def _reports(self, report: Callable[[str], None]) -> None:
        while self.llm.batching.alive:
            report(self.llm.batching.render_metrics())
            time.sleep(REPORT)
