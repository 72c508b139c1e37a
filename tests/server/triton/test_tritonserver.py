"""The real Triton Inference Server on a CPU, driven by its own clients: answers equal LLM.generate's, alone or among
many; bad input gets an error and affects no other request; however a request ends, its slot and pages are freed."""

import asyncio
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import numpy as np
import pytest
from helpers.bundles import tiny_bundle
from helpers.paths import EXAMPLES
from helpers.shared_memory import in_full_shm
from helpers.triton_serving import alive, children, serving, skip_without_server, tensors

skip_without_server()

import tritonclient.grpc as grpcclient  # noqa: E402
import tritonclient.grpc.aio as aioclient  # noqa: E402
import tritonclient.http as httpclient  # noqa: E402

from jet_export import LLM  # noqa: E402

PROMPT = "def mean(values):\n    "
TEXT = "def mean(values):\n    total = 0\n    for v in values:\n        total += v\n    return total / len(values)\n"
HELD = ("jet_slots_used", "jet_kv_pages_used", "jet_window_pages_used", "jet_requests_running", "jet_requests_waiting")
ROUNDING = 2.0**-7  # of the largest logit: two logits, each off by a rounding to bf16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(bundle):
    return LLM(bundle)


@pytest.fixture(scope="module")
def server(bundle):
    with serving(bundle) as server:
        yield server
        status, err = server.terminate()
        assert status == 0, err


@pytest.fixture(autouse=True)
def returns_to_where_it_was(request):
    """After every test on the shared server nothing runs or waits, and all slots and pages are free."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        for name in HELD:
            server.wait_for(name, 0)


def agree(expected, tokens: list[int]) -> int:
    """How many tokens equal those of `expected`, a completion with logits. A difference is allowed at a tie only."""
    for i, token in enumerate(tokens):
        if token != expected.token_ids[i]:
            best, second = expected.logits[i].topk(2).values.tolist()
            assert best - second <= ROUNDING * expected.logits[i].abs().max()
            return i
    return len(tokens)


def ids(answer) -> list[int]:
    """The generate endpoint gives a list of one as a scalar."""
    value = answer["output_ids"]
    return value if isinstance(value, list) else [value]


def test_generate_equals_llm_generate(server, reference) -> None:
    (expected,) = reference.generate(PROMPT, 12)
    answer = server.generate(text_input=PROMPT, max_tokens=12).json()
    assert answer["text_output"] == PROMPT + expected.text
    assert ids(answer) == expected.token_ids
    prompt = reference.tokenizer.encode(PROMPT)
    assert answer["finish_reason"] == "length"
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (len(prompt), 12)
    by_ids = server.generate(input_ids=prompt, max_tokens=12, exclude_input_in_output=True).json()
    assert by_ids["text_output"] == expected.text
    hot = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 11}
    (sampled,) = reference.generate(PROMPT, 20, **hot)
    answer = server.generate(text_input=PROMPT, max_tokens=20, exclude_input_in_output=True, **hot).json()
    assert answer["text_output"] == sampled.text
    stop = sampled.text[8:11]
    cut = server.generate(
        text_input=PROMPT, max_tokens=20, exclude_input_in_output=True, stop_words=[stop], **hot
    ).json()
    assert cut["text_output"] == sampled.text[: sampled.text.index(stop)] and cut["finish_reason"] == "stop"
    ended = server.generate(text_input=PROMPT, max_tokens=20, stop_token_ids=[sampled.token_ids[3]], **hot).json()
    assert ids(ended) == sampled.token_ids[: sampled.token_ids.index(sampled.token_ids[3]) + 1]


def test_requests_of_vllm_and_tensorrt_llm_clients(server, reference) -> None:
    (expected,) = reference.generate("abc", 5)
    vllm = {"text_input": "abc", "parameters": {"stream": False, "temperature": 0, "max_tokens": 5}}
    tensorrt_llm = {
        "text_input": "abc",
        "max_tokens": 5,
        "bad_words": "",
        "stop_words": "",
        "pad_id": 0,
        "beam_width": 1,
    }
    genai_perf = {
        "text_input": ["abc"],
        "stream": [False],
        "exclude_input_in_output": [False],
        "sampling_parameters": ['{"max_tokens": "5", "temperature": "0.0"}'],
    }
    for body in (vllm, tensorrt_llm, genai_perf):
        answer = server.generate(**body)
        assert answer.json()["text_output"] == "abc" + expected.text, answer.text


def test_streams_are_the_whole_in_parts(server, reference) -> None:
    (expected,) = reference.generate(PROMPT, 60, return_logits=True, ignore_eos=True)
    parts = []
    body = {"text_input": PROMPT, "max_tokens": 60, "ignore_eos": True, "stream": True, "logprobs": 2}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as stream:
        parts = [httpx.Response(200, text=x.removeprefix("data: ")).json() for x in stream.iter_lines() if x]
    assert "".join(p["text_output"] for p in parts) == expected.text and len(parts) > 3
    assert [t for p in parts for t in ids(p)] == expected.token_ids
    assert ["finish_reason" in p for p in parts] == [False] * (len(parts) - 1) + [True]
    log_probs = expected.logits.log_softmax(-1).amax(-1)
    assert parts[-1]["cum_log_probs"] == pytest.approx(float(log_probs.sum()), abs=1e-3)
    assert '"rank": 2' in parts[0]["logprobs"]
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}")
    got = []
    client.start_stream(lambda result, error: got.append(error or result))
    inputs = tensors(grpcclient.InferInput, text_input=PROMPT, max_tokens=60, ignore_eos=True, stream=True)
    client.async_stream_infer(server.model, inputs, outputs=[grpcclient.InferRequestedOutput("text_output")])
    client.stop_stream()
    assert b"".join(r.as_numpy("text_output")[0] for r in got).decode() == expected.text
    assert got[0].as_numpy("output_ids") is None  # not asked for
    client.close()


def test_the_example_client(server, reference, capsys) -> None:
    spec = importlib.util.spec_from_file_location("triton_client", EXAMPLES / "triton_client.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    grpc, http = f"--grpc=127.0.0.1:{server.grpc}", f"--http=127.0.0.1:{server.http}"
    (a, b), hot = reference.generate([PROMPT, "class "], 9), reference.generate("class ", 9, temperature=0.7, seed=1)[0]
    example.main([PROMPT, grpc, "--max-tokens=9"])
    captured = capsys.readouterr()
    assert captured.out == a.text and captured.err == "\n[length]\n"
    for way in (grpc, http):
        example.main([PROMPT, "class ", way, "--max-tokens=9"])
        assert capsys.readouterr().out == f"--- {PROMPT}\n{a.text}\n--- class \n{b.text}\n"
        with pytest.raises(SystemExit, match=r"refused: .*empty"):
            example.main(["", way])
    example.main(["class ", grpc, "--max-tokens=9", "--temperature=0.7", "--seed=1"])
    assert capsys.readouterr().out == hot.text
    with pytest.raises(SystemExit, match="Is the server running"):
        example.main(["a", "--http=127.0.0.1:1"])


def test_metadata_and_metrics(server) -> None:
    client = httpclient.InferenceServerClient(f"127.0.0.1:{server.http}")
    assert client.is_server_ready() and client.is_model_ready(server.model)
    config = client.get_model_config(server.model)
    assert config["model_transaction_policy"] == {"decoupled": True} and config["max_batch_size"] == 0
    before = server.settled("jet_requests_total", 'reason="length"')
    tokens = server.total("jet_tokens_total")
    server.generate(text_input="abc", max_tokens=3)
    server.wait_for("jet_requests_total", before + 1, 'reason="length"')
    server.wait_for("jet_tokens_total", tokens + 3)
    label = f'{{instance="{server.model}_0_0",model="{server.model}"}}'

    def whole(values: dict[str, float]) -> bool:  # they are updated one by one: a scrape may fall in between
        buckets = {k.split("_bucket{")[0]: v for k, v in values.items() if "_bucket{" in k and 'le="+Inf"' in k}
        same = all(values[f"{n}_count{label}"] == buckets[n] > 0 for n in ("jet_ttft_seconds", "jet_tpot_seconds"))
        return same and values[f"jet_slots{label}"] == 4 and values[f"jet_tokens_per_second{label}"] > 0

    server.wait_until(whole)
    assert server.total("nv_inference_request_success") > 0


async def stream(client, model: str, leave_after: int | None = None, **values):
    """(token ids, finish reason) of one gRPC stream; None if it was cancelled after `leave_after` responses."""
    tokens: list[int] = []
    responses = 0

    async def requests():
        yield {"model_name": model, "inputs": tensors(aioclient.InferInput, stream=True, **values)}

    iterator = client.stream_infer(requests())
    async for result, error in iterator:
        if error:
            raise error
        responses += 1
        tokens += result.as_numpy("output_ids").tolist()
        if responses == leave_after:
            iterator.cancel()
            return None
        reason = result.as_numpy("finish_reason")
        if reason is not None:
            counts = int(result.as_numpy("num_input_tokens")[0]), int(result.as_numpy("num_output_tokens")[0])
            assert counts == (len(values["input_ids"]), len(tokens))
            return tokens, reason[0].decode()
    raise AssertionError("the stream ended without a finish reason")


def prompts_of(reference, n: int, seed: int = 0) -> list[list[int]]:
    """Mixed lengths, 1 to some 200 tokens."""
    text = reference.tokenizer.encode(TEXT * 6)
    chosen = random.Random(seed)
    return [text[i % 40 : i % 40 + 1 + chosen.randrange(1 + 3 * i)] for i in range(n)]


async def burst(server, prompts: list[list[int]], lengths: list[int], leaving: set[int]) -> list:
    async def one(i: int):
        client = aioclient.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        try:
            left = 2 if i in leaving else None
            n = 300 if i in leaving else lengths[i]
            with suppress(asyncio.CancelledError):
                return await stream(client, server.model, left, input_ids=prompts[i], max_tokens=n, ignore_eos=True)
        finally:
            await client.close()

    return await asyncio.gather(*(one(i) for i in range(len(prompts))))


def test_sixty_four_streams_at_once(server, reference) -> None:
    """Some clients disconnect after two responses; whole answers over HTTP and bad requests come in between."""
    prompts, lengths = prompts_of(reference, 64), [3 + i % 10 for i in range(64)]
    expected = reference.generate(prompts, 12, return_logits=True, ignore_eos=True)
    leaving = set(range(4, 64, 9))
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(server.generate, input_ids=prompts[i], max_tokens=5, ignore_eos=True) for i in range(8)]
        bad = [pool.submit(server.generate, input_ids=[10**6], max_tokens=5) for _ in range(8)]
        answers = asyncio.run(burst(server, prompts, lengths, leaving))
    same = total = 0
    for i, answer in enumerate(answers):
        if i in leaving:
            assert answer is None
            continue
        tokens, reason = answer
        assert (len(tokens), reason) == (lengths[i], "length")
        same, total = same + agree(expected[i], tokens), total + len(tokens)
    for i, response in enumerate(whole):
        same, total = same + agree(expected[i], ids(response.result().json())), total + 5
    print(f"tokens equal to LLM.generate's: {same} of {total}")
    assert same >= 0.9 * total
    assert all("vocabulary" in r.result().json()["error"] for r in bad)


def test_clients_that_disconnect_free_their_slots(server) -> None:
    before = server.settled("jet_requests_total", 'reason="cancelled"')
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}")
    client.start_stream(lambda result, error: None)
    for n in range(6):  # four run, two wait
        more = {"stream": n % 2 == 0, "ignore_eos": True}
        client.async_stream_infer(server.model, tensors(grpcclient.InferInput, text_input=TEXT, max_tokens=900, **more))
    server.wait_for("jet_requests_waiting", 2)
    client.stop_stream(cancel_requests=True)
    server.wait_for("jet_requests_total", before + 6, 'reason="cancelled"')
    body = b'{"text_input": "a", "max_tokens": 900, "stream": true, "ignore_eos": true}'
    head = f"POST /v2/models/{server.model}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http)) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(4096)
    server.wait_for("jet_requests_total", before + 7, 'reason="cancelled"')
    for sent in (b"", b"POST", head.encode() + body[:20], b"\x16\x03\x01\x00\xff" * 50):
        with socket.create_connection(("127.0.0.1", server.http)) as connection:
            connection.sendall(sent)
    assert server.client.get(f"http://127.0.0.1:{server.http}/v2/health/ready").status_code == 200


BODIES = [
    (b'{"text_input": "\xe9"}', "not UTF-8"),
    (b"\xff\xfe{}", "parse"),
    (b"{", "parse"),
    (b"[" * 100_000, "parse"),
    (b"null", "non-object"),
    (b'{"text_input": "a", "temperature": NaN}', "temperature nan"),
    (b'{"text_input": "a", "top_p": NaN}', "top_p nan"),
    (b'{"text_input": "a", "temperature": 1e999}', "parse"),
    (b'{"text_input": "\\ud800"}', "surrogate"),
    (b'{"text_input": "' + b"a" * 10_000_000 + b'"}', "no more than"),
    (b'{"text_input": "a", "max_tokens": -4}', "max_new_tokens is -4"),
    (b'{"text_input": "a", "max_tokens": 100000}', "exceed max_seq_len 1024"),
    (b'{"text_input": "a", "max_tokens": "7"}', "parse"),
    (b'{"text_input": "a", "temperature": -1}', "temperature -1"),
    (b'{"text_input": "a", "top_k": -1}', "top_k -1"),
    (b'{"text_input": "a", "repetition_penalty": 0}', "repetition_penalty 0"),
    (b'{"text_input": "a", "seed": -1}', "parse"),
    (b'{"text_input": "a", "stop_token_ids": [4096]}', "token 4096 is not in the vocabulary"),
    (b'{"text_input": "a", "logprobs": 21}', "logprobs 21"),
    (b'{"text_input": "a", "beam_width": 4}', "beam_width"),
    (b'{"text_input": "a", "lora_name": "x"}', "lora_name is not supported"),
    (b'{"text_input": "a", "sampling_parameters": "{"}', "sampling_parameters is not JSON"),
    (b'{"input_ids": [4096]}', "token 4096 is not in the vocabulary"),
    (b'{"input_ids": [-1]}', "token -1"),
    (b'{"input_ids": []}', "empty"),
    (b'{"text_input": ""}', "empty"),
    (b'{"text_input": "a", "input_ids": [1]}', "one of the two"),
    (b"{}", "one of the two"),
    (b'{"text_input": ["a", "b"]}', "shape"),
]
RAW = [b"", b"\xff\xff\xff\xffabc", b"\x02\x00\x00\x00\xff\xfe", b"\x01\x00\x00\x00a\x01", b"\x01\x00\x00\x00a" * 2]


def raw_error(server, content: bytes) -> str:
    """The error of a gRPC stream whose text_input has these bytes."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name=server.model, raw_input_contents=[content])
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return next(iter(stub.ModelStreamInfer(iter([request]), timeout=60))).error_message


def test_bad_requests_get_a_reason_and_affect_no_other(server, reference) -> None:
    (expected,) = reference.generate("abc", 100, ignore_eos=True)

    def good():
        return server.generate(text_input="abc", max_tokens=100, ignore_eos=True, exclude_input_in_output=True)

    def bad(body: bytes) -> httpx.Response:
        return server.client.post(f"{server.url}/generate", content=body)

    used = []
    for _ in range(2):  # in the second round memory must not grow
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(good) for _ in range(4)]
            for body, message in BODIES:
                answer = bad(body)
                assert 400 <= answer.status_code <= 500 and message in answer.json()["error"], (body[:80], answer.text)
                assert len(answer.content) < 1000 and "Traceback" not in answer.text
            for content in RAW:
                assert raw_error(server, content)
        assert [a.result().json()["text_output"] for a in answers] == [expected.text] * 4
        used.append(server.memory())
    print(f"memory after each round: {used[0] >> 20}, {used[1] >> 20} MiB")
    assert used[1] - used[0] < 64 << 20


def test_killed_and_started_again_then_told_to_stop(bundle, reference) -> None:
    """A killed server is reported and leaves no process; another one starts on the same ports; SIGTERM lets running
    requests finish."""
    (expected,) = reference.generate("abc", 100, ignore_eos=True)
    body = {"text_input": "abc", "max_tokens": 100, "stream": True, "ignore_eos": True}
    long = {**body, "max_tokens": 1000}
    with (
        serving(bundle) as server,
        httpx.stream("POST", f"{server.url}/generate_stream", json=long, timeout=60) as answer,
    ):
        next(lines := answer.iter_lines())
        stubs = children(server.server_pid)
        os.kill(server.server_pid, signal.SIGKILL)
        with pytest.raises((httpx.NetworkError, httpx.ProtocolError)):
            list(lines)
        status, err = server.finish()
        assert status == 2 and "tritonserver ended killed by signal 9" in err and "Traceback" not in err
        end = time.monotonic() + 30
        while any(alive(pid) for pid in stubs):
            assert time.monotonic() < end, "the backend outlives its server"
            time.sleep(0.1)
    ports = ["--http-port", server.http, "--grpc-port", server.grpc, "--metrics-port", server.metrics]
    with serving(bundle, *map(str, ports)) as server:
        with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as answer:
            next(lines := answer.iter_lines())
            server.program.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert '"finish_reason":"length"' in last and '"num_output_tokens":100' in last
        status, err = server.finish()
        assert status == 0 and "Traceback" not in err, err
    assert expected.token_ids[-1] == httpx.Response(200, text=last.removeprefix("data: ")).json()["output_ids"]


def test_two_instances_share_the_work_and_stop_in_time(bundle, reference) -> None:
    """Both answer correctly; after the grace period running requests end with an answer that gives the reason.

    Triton gives a request to the idle instance that has run the fewest. How it splits a burst depends on timing; that
    two requests to two idle instances go to one each does not.
    """
    prompts = prompts_of(reference, 24, seed=1)
    expected = reference.generate(prompts, 8, return_logits=True, ignore_eos=True)
    program = ("-m", "helpers.triton_serving")
    with serving(bundle, "2", "0.2", program=program) as server:

        def done() -> list[float]:
            labels = [f"{server.model}_0_{i}" for i in (0, 1)]
            return [server.total("jet_requests_total", label, 'reason="length"') for label in labels]

        first = [asyncio.run(burst(server, [p], [8], set()))[0] for p in prompts[:2]]
        server.wait_for("jet_requests_total", 2, 'reason="length"')
        assert done() == [1, 1]
        answers = asyncio.run(burst(server, prompts, [8] * 24, set()))
        server.wait_for("jet_requests_total", 2 + 24, 'reason="length"')
        assert min(done()) > 1, done()
        assert all((len(tokens), reason) == (8, "length") for tokens, reason in answers + first)
        pairs = zip(expected + expected[:2], answers + first, strict=True)
        assert sum(agree(e, tokens) for e, (tokens, _) in pairs) >= 0.9 * 26 * 8
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(server.generate, text_input="a", max_tokens=1000, ignore_eos=True)
            server.wait_for("jet_requests_running", 1)
            server.program.send_signal(signal.SIGTERM)
            assert "shutting down" in whole.result().json()["error"]
        status, err = server.finish()
        assert status == 0 and "Traceback" not in err, err


def test_a_full_dev_shm_is_reported(bundle) -> None:
    """Triton's stubs have their tensors there."""
    serve = [sys.executable, "-m", "jet_export.cli.app", "serve", str(bundle)]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    done = subprocess.run(in_full_shm(*serve, *ports), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: tritonserver does not start: "), done.stderr
    assert "at least 1 MB of shared memory" in done.stderr and "No space left on device" in done.stderr


def test_numbers_keep_their_decimals(server, reference) -> None:
    """0.7 in a 32-bit tensor is the 0.7 of LLM.generate."""
    (expected,) = reference.generate("abc", 30, temperature=0.7, top_p=0.9, seed=3)
    values = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "max_tokens": 30, "text_input": "abc", "stream": False}
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}")
    got: list = []
    client.start_stream(lambda result, error: got.append(error or result))
    client.async_stream_infer(server.model, tensors(grpcclient.InferInput, **values))
    client.stop_stream()
    client.close()
    assert np.array_equal(got[0].as_numpy("output_ids"), expected.token_ids)
