"""Many requests on an engine in this process, a few more than its slots in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.params import Logprob, Output, Params
from jet_export.runtime.sequence import RunningSequence
from jet_export.utils.errors import JetExportError


@dataclass
class Answer:
    """What a request has received."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob, ...] = ()  # of the prompt's tokens but the first, where they were asked for

    def add(self, output: Output) -> None:
        self.text += output.text
        self.prompt_logprobs += output.prompt_logprobs
        if output.token is not None:
            self.tokens.append(output.token)


def run_requests(
    batching: BatchingEngine,
    requests: Iterable[tuple[list[int], Params]],
    on_end: Callable[[int, Answer], None],
) -> None:
    """Run (prompt, params) each; `on_end(i, answer)` once request i has ended, in whatever order they end. An answer is
    not kept: the log probabilities of all prompts together may be too large for memory.

    Raises JetExportError for a request that could never run, and if the engine fails.
    """
    running: dict[int, RunningSequence] = {}
    failed: list[str] = []
    most = 2 * len(batching.runner.context_lens) + 2  # a step may end every sequence, and the next is planned before it

    def submit(i: int, prompt: list[int], params: Params) -> None:
        answer = Answer()

        def on_output(output: Output) -> None:
            answer.add(output)
            if output.finish_reason is None:
                return
            del running[i]
            if output.finish_reason in ("stop", "length"):
                on_end(i, answer)
            else:
                failed.append(output.finish_reason)

        text = params.prompt_logprobs is None
        running[i] = batching.submit(prompt, params, on_output, text=text)

    left = iter(enumerate(requests))
    try:
        more = True
        while more or running:
            while more and len(running) < most:
                following = next(left, None)
                if following is None:
                    more = False
                else:
                    submit(following[0], *following[1])
            batching.step()
            if failed:
                raise JetExportError(f"The engine failed ({batching.failure or failed[0]}).") from batching.failure
    finally:
        for sequence in list(running.values()):
            batching.cancel(sequence)
