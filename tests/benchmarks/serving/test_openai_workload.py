"""benchmarks/serving/openai_workload.py against our own server; and answers that give no figure."""

import threading

import pytest
from helpers.scripts import load_script

pytest.importorskip("fastapi")

from helpers.serving import async_llm, server


@pytest.fixture(scope="module")
def script():
    loaded = load_script("serving/openai_workload.py")
    loaded.meet_at(threading.Barrier(1))
    return loaded


class OneAfterTheOther:
    """In place of the pool of processes."""

    def map(self, f, arguments, chunksize: int) -> list:
        return [f(a) for a in arguments]


HERE = OneAfterTheOther()


@pytest.mark.parametrize("processes, concurrency", [(1, 0), (3, 4)])
def test_every_kind_is_served_whole(script, processes, concurrency) -> None:
    work = [([i + 1] * (4 + i), 3 + i % 3) for i in range(7)]
    with server(async_llm()) as url:
        for kind in ("greedy", "temperature 1", "t 0.8 top_p 0.95", "t 0.8 top_k 50", "schema"):
            bodies = [script.body_of("mini", kind, i, prompt, new) for i, (prompt, new) in enumerate(work)]
            start, answers = script.run(HERE, processes, url, bodies, concurrency, 60.0)
            found = script.summary(start, answers, work)
            assert found["tokens"] == sum(new for _, new in work) and found["tokens_per_s"] > 0


def test_a_refused_request_and_a_short_answer_give_no_figure(script) -> None:
    with server(async_llm()) as url:
        body = script.body_of("another", "greedy", 0, [1, 2], 3)
        start, answers = script.run(HERE, 1, url, [body], 1, 60.0)
    with pytest.raises(SystemExit, match=r"request 0: 404: .*not served here"):
        script.summary(start, answers, [([1, 2], 3)])
    with pytest.raises(SystemExit, match="request 0: 2 of 3 tokens"):
        script.summary(0.0, [script.Answer([1.0, 2.0], 2)], [([1, 2], 3)])


def test_a_server_that_is_not_there(script) -> None:
    body = script.body_of("mini", "greedy", 0, [1], 1)
    _, (answer,) = script.run(HERE, 1, "http://127.0.0.1:9", [body], 1, 5.0)
    assert "ConnectError" in answer.error
