"""An engine that fails in a step, loses its device, or hangs: who learns of it, what goes on, how the process ends."""

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("fastapi")

from helpers.eager_bundle import eager_engine
from helpers.serving import program, server, wait_until
from helpers.shared_memory import in_full_shm

from jet_export.bundle.limits import Limits
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.runtime.watchdog import Watchdog
from jet_export.utils.errors import ENGINE_LOST, JetExportError, device_lost

LIMITS = Limits(max_batch_size=2, max_seq_len=96, prefill_chunk=32)
GOOD = {"model": "mini", "prompt": "abcdef", "max_tokens": 8, "temperature": 0}
LOST = "CUDA error: an illegal memory access was encountered"


class Faulty:
    """An eager engine whose next calls do what `faults` say, by the name of the call; None: as ever."""

    def __init__(self) -> None:
        self.engine = eager_engine(LIMITS)
        self.faults: dict[str, Callable[[], object]] = {}
        for name in ("prefill", "decode"):
            setattr(self.engine, name, self._faulty(name, getattr(self.engine, name)))

    def _faulty(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any) -> Any:
            fault = self.faults.pop(name, None)
            return fault() if fault else call(*args)

        return faulty


def raises(e: Exception) -> Callable[[], object]:
    def fault() -> object:
        raise e

    return fault


@pytest.fixture
def faulty() -> Faulty:
    return Faulty()


@pytest.fixture
def llm(faulty: Faulty) -> AsyncLLM:
    return AsyncLLM.over(BatchingEngine(faulty.engine, ByteTokenizer(), -1))


def post(address: str, **changes: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/completions", json={**GOOD, **changes}, timeout=30)


@pytest.mark.parametrize("call", ["prefill", "decode"])
@pytest.mark.parametrize(
    "e", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), RuntimeError("x")]
)
def test_a_step_that_fails_costs_its_requests_and_no_other(
    faulty: Faulty, llm: AsyncLLM, call: str, e: Exception
) -> None:
    """Also where memory runs out: the next request has a slot, its pages and its own answer."""
    with server(llm) as address:
        expected = post(address).json()["choices"][0]["text"]
        for _ in range(LIMITS.max_batch_size + 1):  # a slot lost each time would be noticed
            faulty.faults[call] = raises(e)
            assert post(address).status_code == 500
        assert post(address).json()["choices"][0]["text"] == expected
        assert llm.batching.scheduler.slots.used == 0 and httpx.get(f"{address}/health").status_code == 200


def test_a_lost_device_ends_every_request_and_the_process(faulty: Faulty, llm: AsyncLLM, monkeypatch, caplog) -> None:
    """All later calls would fail too: requests are told, /health says 503, and the status asks for a new start."""
    monkeypatch.setattr("jet_export.runtime.watchdog.LAST_ANSWERS", 0)
    ended: list[int] = []
    dog = Watchdog(llm.batching, 0, end=ended.append)
    with server(llm) as address:
        assert not dog.check()
        faulty.faults["decode"] = raises(RuntimeError(LOST))
        assert post(address).status_code == 500
        wait_until(lambda: llm.batching.lost is not None)
        assert httpx.get(f"{address}/health").status_code == 503
        assert post(address).status_code in (429, 503)  # refused, at once
        assert dog.check() and ended == [ENGINE_LOST]
    assert "illegal memory access" in caplog.text and f"status {ENGINE_LOST}" in caplog.text


def test_an_engine_that_hangs_ends_the_process_and_the_log_says_where(
    faulty: Faulty, llm: AsyncLLM, capfd, caplog
) -> None:
    released = threading.Event()
    ended: list[int] = []
    clock = [0.0]

    def stuck_in_a_kernel() -> object:
        released.wait(60)
        raise RuntimeError("released")

    dog = Watchdog(llm.batching, 30, end=ended.append, clock=lambda: clock[0])
    with server(llm) as address:
        faulty.faults["decode"] = stuck_in_a_kernel
        client = threading.Thread(target=post, args=(address,))
        client.start()
        try:
            wait_until(lambda: llm.batching.step_began is not None and "decode" not in faulty.faults)
            clock[0] = (llm.batching.step_began or 0) + 29
            assert not dog.check() and httpx.get(f"{address}/health").status_code == 200
            clock[0] += 2
            assert dog.check() and ended == [ENGINE_LOST]
            assert httpx.get(f"{address}/health").status_code == 503
        finally:
            released.set()
            client.join()
    assert "the engine hangs: a step has taken more than 30 s, at wait (threading.py" in caplog.text
    assert "stuck_in_a_kernel" in caplog.text
    assert "stuck_in_a_kernel" in capfd.readouterr().err  # and every thread's stack


def test_a_full_dev_shm_is_none_of_a_servers_business() -> None:
    """With a front end of its own, too; Triton's is in tests/server/triton."""
    with program("0", "1", "--frontends", "1", inside=in_full_shm) as (_, address):
        assert post(address).json()["usage"]["completion_tokens"] == 8


def test_what_says_that_a_device_is_lost() -> None:
    assert device_lost(RuntimeError(LOST))
    assert device_lost(RuntimeError("CUDA error: unspecified launch failure\nCompile with ..."))
    for e in (
        torch.OutOfMemoryError("CUDA out of memory. x"),
        RuntimeError("CUDA error: out of memory"),
        ValueError("x"),
        None,
    ):
        assert not device_lost(e)


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_a_limit_that_is_none_is_refused(llm: AsyncLLM, seconds: float) -> None:
    with pytest.raises(JetExportError, match=r"--step-timeout .*: not a time"):
        Watchdog(llm.batching, seconds)


def test_memory_that_runs_out_while_graphs_are_captured_is_one_message(llm: AsyncLLM, monkeypatch, capsys) -> None:
    """Before it serves: the process ends as for any other bundle that does not fit."""
    import sys

    from jet_export.cli import app as cli
    from jet_export.server.openai import serve

    def capture(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 MiB. GPU 0 is full.")

    monkeypatch.setattr(llm.batching.runner, "capture_calls", capture)
    monkeypatch.setattr(serve, "serve", lambda *args: llm.start())
    monkeypatch.setattr(sys, "argv", ["jet-export", "serve", "bundle", "--openai"])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 2 and "error: CUDA out of memory. Tried to allocate" in capsys.readouterr().err
