"""The engine's end of its front ends' channels: requests come in, and one message a step and front end goes out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.grammar_compile import in_loop
from jet_export.runtime.params import Output
from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.sequence import OnOutput, RunningSequence
from jet_export.runtime.serving_engine import Status
from jet_export.server.ipc.channel import Channel
from jet_export.server.ipc.messages import (
    Cancel,
    Kind,
    Refused,
    Submit,
    decode_id,
    encode_cached,
    encode_outputs,
    encode_status,
)
from jet_export.utils.errors import JetExportError


class EngineServer:
    """Shares an engine among front ends. The thread that takes the steps sends their tokens itself: handing them to
    another thread would cost it as much."""

    def __init__(self, batching: BatchingEngine) -> None:
        self.batching = batching
        self._links: list[Link] = []
        batching.after_step = self._flush

    def connect(self, sock: socket.socket, on_ready: Callable[[], None], on_lost: Callable[[], None]) -> Link:
        """Serve the front end at the other end of `sock`, in the running event loop.

        `on_ready()`: it listens. `on_lost()`: it is gone, and its requests are cancelled.
        """
        link = Link(self.batching, sock, on_ready)

        def lost() -> None:
            self.disconnect(link)
            on_lost()

        link.channel = Channel(sock, link.on_frame, lost)
        link.channel.open()
        with self.batching.lock:
            self._links.append(link)
        return link

    def disconnect(self, link: Link) -> None:
        """Cancel the requests of a front end and close its channel."""
        link.channel.close()
        link.cancel_all()
        with self.batching.lock:
            if link in self._links:
                self._links.remove(link)

    def _flush(self) -> None:
        """After a step, under the engine's lock."""
        for link in self._links:
            link.flush()


class Link:
    """One front end and its requests."""

    channel: Channel

    def __init__(self, batching: BatchingEngine, sock: socket.socket, on_ready: Callable[[], None]) -> None:
        self.batching, self._on_ready = batching, on_ready
        self._sequences: dict[int, RunningSequence] = {}  # by request id; under the engine's lock, like `_outputs`
        self._outputs: list[tuple[int, Output]] = []
        self._cached: list[tuple[int, int]] = []
        self._compiling: dict[int, tuple[Submit, dict[int, str]]] = {}  # by first id, with the ids cancelled meanwhile

    def flush(self) -> None:
        if self._cached:
            cached, self._cached = self._cached, []
            self.channel.send(Kind.CACHED, encode_cached(cached))
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self.channel.send(Kind.OUTPUTS, encode_outputs(outputs))

    def drain(self) -> None:
        """Ask the front end to finish its requests and exit."""
        self.channel.send(Kind.DRAIN, b"")

    def cancel_all(self) -> None:
        self._compiling.clear()
        with self.batching.lock:
            for sequence in list(self._sequences.values()):
                self.batching.cancel(sequence)

    def on_frame(self, kind: int, payload: bytes) -> None:
        """Raises ValueError for a message that makes no sense."""
        if kind == Kind.SUBMIT:
            self._receive(Submit.decode(payload))
        elif kind == Kind.CANCEL:
            self._cancel(Cancel.decode(payload))
        elif kind == Kind.ASK_STATUS:
            status = Status(self.batching.alive, self.batching.render_metrics())
            self.channel.send(Kind.STATUS, encode_status(decode_id(payload), status))
        elif kind == Kind.READY:
            self._on_ready()
        else:
            raise ValueError(f"a message of kind {kind}")

    def _receive(self, submit: Submit) -> None:
        grammar = submit.params.grammar
        if grammar is None:
            self._submit(submit)
            return
        self._compiling[submit.first] = (submit, {})

        def compiled(error: JetExportError | None) -> None:
            _, cancelled = self._compiling.pop(submit.first, (submit, None))
            if cancelled is None:  # the front end is gone
                return
            if error is not None:
                self._refuse(submit, error)
            elif len(cancelled) < len(submit.prompts):
                self._submit(submit)
                for i, reason in cancelled.items():
                    self._cancel(Cancel(i, reason))

        self.batching.grammars.start(grammar, in_loop(asyncio.get_running_loop(), compiled))

    def _cancel(self, cancel: Cancel) -> None:
        for submit, cancelled in self._compiling.values():
            if submit.first <= cancel.id < submit.first + len(submit.prompts):
                cancelled[cancel.id] = cancel.reason
        with self.batching.lock:
            sequence = self._sequences.get(cancel.id)
            if sequence:
                self.batching.cancel(sequence, cancel.reason)

    def _refuse(self, submit: Submit, e: JetExportError) -> None:
        refused = Refused(submit.first, isinstance(e, QueueFull), str(e))
        self.channel.send(Kind.REFUSED, refused.encode())

    def _submit(self, submit: Submit) -> None:
        """All prompts or none: then no output may go out before the last one is queued. The lock also holds up the
        steps, so it is not taken for one prompt."""
        ids = range(submit.first, submit.first + len(submit.prompts))
        with self.batching.lock if len(ids) > 1 else contextlib.nullcontext():
            try:
                leader: RunningSequence | None = None
                for at, (i, prompt) in enumerate(zip(ids, submit.prompts, strict=True)):
                    choice = at % submit.params.n
                    sequence = self.batching.submit(
                        prompt,
                        submit.params,
                        self._sender(i),
                        text=False,
                        leader=leader if choice else None,
                        choice=choice,
                    )
                    leader = leader if choice else sequence
                    self._add(i, sequence)
            except JetExportError as e:
                self._refuse(submit, e)  # before what the cancelled ones send
                for i in ids:
                    if i in self._sequences:
                        self.batching.cancel(self._sequences[i])

    def _add(self, i: int, sequence: RunningSequence) -> None:
        with self.batching.lock:
            if sequence.finish_reason is None:  # otherwise it has run meanwhile
                self._sequences[i] = sequence
            if sequence.tokens and sequence.cached_tokens:  # its first token went out before it was known here
                self._cached.append((i, sequence.cached_tokens))

    def _sender(self, i: int) -> OnOutput:
        def put(output: Output) -> None:
            sequence = self._sequences.get(i)
            if sequence and len(sequence.tokens) == 1 and sequence.cached_tokens:
                self._cached.append((i, sequence.cached_tokens))
            self._outputs.append((i, output))
            if output.finish_reason is not None:
                self._sequences.pop(i, None)
            if not self.batching.delivering:
                self.flush()

        return put
