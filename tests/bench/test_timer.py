"""The timer: what is timed by a CUDA graph stays where the graph reads it."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from jet_export.bench import timer


def test_a_capture_keeps_what_its_replays_read(monkeypatch: pytest.MonkeyPatch) -> None:
    replays = []
    graph = SimpleNamespace(replay=lambda: replays.append(1))
    for name, stub in (("Stream", nullcontext), ("stream", nullcontext), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda g: nullcontext())
    calls = []

    def made() -> tuple[weakref.ref, Callable[[], None]]:
        x = torch.zeros(4)
        return weakref.ref(x), timer.capture(lambda: calls.append(len(x)), warmup=2)

    read, replay = made()
    gc.collect()
    assert read() is not None and calls == [4] * 3
    replay()
    assert replays == [1] and len(calls) == 3
    del replay
    gc.collect()
    assert read() is None
