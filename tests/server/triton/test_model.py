"""The model for Triton's Python backend, over a stand-in for the backend's module: how requests end."""

import json
import os
import time

import numpy as np
import pytest

from jet_export.utils.errors import JetExportError

pytest.importorskip("pydantic")
pytest.importorskip("uvicorn")

from helpers.serving import async_llm

from jet_export.runtime.capacity import Serving
from jet_export.server.triton import model as triton
from jet_export.server.triton.tensors import CONTROL, OUTPUTS


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class TritonError:
    INVALID_ARG, UNAVAILABLE, INTERNAL, CANCELLED = "INVALID_ARG", "UNAVAILABLE", "INTERNAL", "CANCELLED"

    def __init__(self, message, code):
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.values = {t.name: t.array for t in output_tensors}
        self.error = error


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    created: dict = {}  # noqa: RUF012

    def __init__(self, name, description, kind):
        self.name, self.kind = name, kind

    def Metric(self, labels):
        self.created[self.name, str(labels)] = self
        self.value = 0.0
        return self

    def set(self, value):
        assert self.kind == self.GAUGE
        self.value = value

    def increment(self, value):
        assert self.kind == self.COUNTER and value > 0
        self.value += value


class Backend:
    """The parts of triton_python_backend_utils that the model uses."""

    Tensor, TritonError, InferenceResponse, MetricFamily = Tensor, TritonError, InferenceResponse, MetricFamily
    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonModelException = RuntimeError

    @staticmethod
    def get_input_tensor_by_name(request, name):
        return request.tensors.get(name)


class Request:
    """A request that is also its own response sender."""

    def __init__(self, parameters=None, outputs=None, **tensors):
        lists = {k: v if isinstance(v, list) else [v] for k, v in tensors.items()}
        text = {k: object if isinstance(v[0], bytes) else None for k, v in lists.items()}
        self.tensors = {k: Tensor(k, np.array(v, text[k])) for k, v in lists.items()}
        self._parameters, self.outputs = json.dumps(parameters or {}), outputs or [t.name for t in OUTPUTS]
        self.responses, self.done, self.cancelled, self.slow = [], False, False, 0.0

    def parameters(self):
        return self._parameters

    def requested_output_names(self):
        return self.outputs

    def get_response_sender(self):
        return self

    def is_cancelled(self):
        assert not self.done
        return self.cancelled

    def send(self, response, flags=0):
        assert not self.done, "a response after the final one"
        time.sleep(self.slow)
        self.responses.append(response)
        self.done = flags == 1

    def wait(self):
        end = time.monotonic() + 60
        while not self.done:
            assert time.monotonic() < end
            time.sleep(0.005)
        return self.responses[-1]


@pytest.fixture
def model(monkeypatch, request, tmp_path):
    monkeypatch.setenv(CONTROL, str(tmp_path))
    options = getattr(request, "param", {})
    monkeypatch.setattr(triton, "AsyncLLM", lambda bundle, serving: async_llm(**options))
    config = {"parameters": {"bundle": {"string_value": "x"}}, "instance_group": [{"count": 1}]}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = {
        "model_config": json.dumps(config),
        "model_repository": "/",
        "model_name": "mini",
        "model_instance_name": "mini_0",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    }
    model = triton.TritonModel(Backend, args)
    yield model
    model.finalize()
    assert not model.open and model.batching.scheduler.slots.used == 0


def run(model, *requests: Request) -> None:
    assert model.execute(list(requests)) is None


def test_slow_readers_get_fewer_larger_responses(model) -> None:
    slow = Request(text_input=b"abc", max_tokens=60, stream=True)
    slow.slow = 0.2
    whole = Request(text_input=b"abc", max_tokens=60, outputs=["output_ids"])
    run(model, slow, whole)
    slow.wait()
    assert 2 <= len(slow.responses) < 60
    tokens = np.concatenate([r.values["output_ids"] for r in slow.responses])
    assert tokens.tolist() == whole.wait().values["output_ids"].tolist() and len(tokens) == 60
    assert list(whole.responses[0].values) == ["output_ids"] and len(whole.responses) == 1


@pytest.mark.parametrize("model", [{"slots": 1, "max_waiting": 2, "wait_timeout": 0.2}], indirect=True)
def test_a_full_queue_a_timeout_a_cancellation_and_a_shutdown(model, tmp_path) -> None:
    running = Request(text_input=b"abc", max_tokens=390, stream=True)
    gone, late, full = (Request(text_input=b"abc", max_tokens=2) for _ in range(3))
    run(model, running)
    while not running.responses:
        time.sleep(0.01)
    run(model, gone, late, full)
    gone.cancelled = True
    errors = [r.wait().error for r in (full, gone, late)]
    assert [e.code for e in errors] == ["UNAVAILABLE", "CANCELLED", "UNAVAILABLE"]
    assert "waiting" in errors[0].message and "too long in the queue" in errors[2].message
    assert (tmp_path / "mini_0.busy").exists()
    (tmp_path / "stop").touch()
    (tmp_path / "draining").touch()
    assert "shutting down" in running.wait().error.message
    while not (tmp_path / "mini_0.idle").exists():
        time.sleep(0.01)
    assert not (tmp_path / "mini_0.busy").exists()
    later = Request(text_input=b"abc")
    run(model, later)
    assert later.wait().error.code == "UNAVAILABLE"


def test_bad_requests_and_unexpected_errors_are_answered_once(model, monkeypatch) -> None:
    bad = [
        Request(text_input=b"\xff"),
        Request(text_input=b"a" * 2_000_000),
        Request(text_input=[b"a", b"b"]),
        Request(input_ids=[-1]),
        Request({"nonsense": 1}, text_input=b"a"),
    ]
    run(model, *bad)
    errors = [r.wait().error for r in bad]
    assert {e.code for e in errors} == {"INVALID_ARG"}
    for e, words in zip(errors, ("not UTF-8", "no more than", "takes one", "token -1", "nonsense"), strict=True):
        assert words in e.message
    monkeypatch.setattr(model.batching.tokenizer, "encode", lambda text: 1 / 0)
    broken = Request(text_input=b"a")
    run(model, broken)
    assert broken.wait().error.code == "INTERNAL"
    assert not model.open


def test_a_response_that_cannot_be_sent_cancels_its_request(model, monkeypatch) -> None:
    lost = Request(text_input=b"abc", max_tokens=390, stream=True)
    monkeypatch.setattr(lost, "send", lambda response, flags=0: 1 / 0)
    run(model, lost)
    end = time.monotonic() + 10
    while model.open:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert model.batching.metrics.requests["cancelled"] == 1


def test_metrics_follow_the_engines(model) -> None:
    request = Request(text_input=b"abc", max_tokens=5)
    run(model, request)
    request.wait()
    model.metrics.update(model.batching.render_metrics())
    values = {k: v.value for k, v in MetricFamily.created.items() if "mini" in k[1]}
    label = str({"model": "mini", "instance": "mini_0"})
    assert values["jet_tokens_total", label] == 5 and values["jet_slots", label] == 4
    assert values["jet_ttft_seconds_count", label] == 1


def test_serving_options_are_read_from_the_configuration() -> None:
    parameters = {"bundle": "x", "slots": "3", "wait_timeout": "2.5"}
    assert triton.serving_options(parameters) == Serving(slots=3, wait_timeout=2.5)
    drafted = triton.serving_options({"speculate": '"lookup"', "drafts": "4"})
    assert drafted == Serving(speculate="lookup", drafts=4)
    with pytest.raises(JetExportError, match=r"config.pbtxt: .*is not a number"):
        triton.serving_options({"slots": "many"})


def test_one_gpu_per_instance(monkeypatch) -> None:
    args = {"model_instance_kind": "GPU", "model_instance_device_id": "1"}
    for before, after in (("", "1"), ("4,6", "6"), ("GPU-a,GPU-b", "GPU-b")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        triton.use_device(args, {})
        assert os.environ["CUDA_VISIBLE_DEVICES"] == after
