"""The model that Triton Inference Server's Python backend runs: a BatchingEngine behind Triton's requests.

Three threads: the backend calls `execute`, which queues requests; the engine's thread generates tokens; a third thread
sends responses, since sending blocks on the server. A request's tokens that arrive while it sends others go into one
response. This thread also polls for cancellations, which Triton does not announce, and updates the server's metrics.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jet_export.bundle.signature import trust
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Logprob, Output
from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.watchdog import Watchdog
from jet_export.server.fields import FAILURES, max_prompt_bytes
from jet_export.server.triton.metrics import TritonMetrics
from jet_export.server.triton.request import RequestFields, parse_request
from jet_export.server.triton.tensors import CONTROL, INPUTS, OUTPUTS
from jet_export.utils.errors import JetExportError

log = logging.getLogger(__name__)
POLL_INTERVAL = 0.05  # seconds between polls for cancellations and for the shutdown
METRICS_INTERVAL = 1.0  # seconds between updates of the metrics
NUMPY = {"STRING": np.object_, "INT32": np.int32, "UINT32": np.uint32, "FP32": np.float32}
KINDS = {t.name: NUMPY[t.kind] for t in OUTPUTS}


class Reply:
    """A request being answered. Outputs collect in `pending` until the sending thread takes them."""

    def __init__(self, request: Any, sender: Any, fields: RequestFields, prompt: list[int]) -> None:
        self.sender = sender
        self.fields, self.prompt, self.with_prompt = fields, prompt, fields.with_prompt
        self.outputs = set(request.requested_output_names()) - fields.disabled_outputs()
        self.pending: list[Output] = []
        self.num_tokens, self.cumulative_logprob = 0, 0.0
        self.cancelled = False
        self.sequence: RunningSequence | None = None


class TritonModel:
    """`pb_utils`: the backend's module, importable in its process only. Raises JetExportError as AsyncLLM does."""

    def __init__(self, pb_utils: Any, args: dict[str, str]) -> None:
        self.pb = pb_utils
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        use_device(args, config)
        if key := parameters.pop("trusted_key", None):
            trust(Path(key))
        bundle = Path(args["model_repository"]) / parameters["bundle"]  # an absolute path overrides the first part
        self.batching: BatchingEngine = AsyncLLM(bundle, serving_options(parameters)).batching
        Watchdog(self.batching, float(parameters.get("step_timeout", 0))).start()
        self.max_bytes = max_prompt_bytes(self.batching.scheduler.capacity.max_seq_len)
        self.lock = threading.Lock()
        self.open: set[Reply] = set()
        self.ready: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        labels = {"model": args["model_name"], "instance": args["model_instance_name"]}
        self.metrics = TritonMetrics(pb_utils, labels)
        self.control = Path(os.environ[CONTROL]) if CONTROL in os.environ else None
        self.instance = args["model_instance_name"]
        self._report_idle(False)
        self.batching.start()
        self.sender = threading.Thread(target=self._send_loop, name="jet-replies", daemon=True)
        self.sender.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()  # exactly one per request
            try:
                self._begin(request, sender)
            except QueueFull as e:
                self._refuse(sender, "UNAVAILABLE", str(e))
            except JetExportError as e:
                self._refuse(sender, "INVALID_ARG", str(e))
            except Exception:
                log.exception("a request failed")
                self._refuse(sender, "INTERNAL", "The server failed on this request.")

    def finalize(self) -> None:
        """Cancel and answer the remaining requests, and end the threads."""
        self.batching.stop()
        self.ready.put(None)
        self.sender.join()
        self.metrics.close()
        self._report_idle(True)

    def _begin(self, request: Any, sender: Any) -> None:
        fields = parse_request(self._tensors(request), request.parameters())
        params, text = fields.params, fields.text_input
        prompt = self.batching.tokenizer.encode(text) if text is not None else fields.input_ids or []
        reply = Reply(request, sender, fields, prompt)
        with self.lock:
            self.open.add(reply)
        try:
            reply.sequence = self.batching.submit(prompt, params, lambda output: self._on_output(reply, output))
        except BaseException:
            with self.lock:
                self.open.discard(reply)
            raise

    def _tensors(self, request: Any) -> dict[str, Any]:
        """The input tensors as Python values. Raises JetExportError for text that is not UTF-8 or too long."""
        values: dict[str, Any] = {}
        for spec in INPUTS:
            tensor = self.pb.get_input_tensor_by_name(request, spec.name)
            if tensor is None:
                continue
            items = [self._to_python(spec.name, x) for x in tensor.as_numpy().reshape(-1)]
            if spec.dim == 1 and len(items) != 1:
                raise JetExportError(f"{spec.name}: {len(items)} values, where it takes one.")
            values[spec.name] = items[0] if spec.dim == 1 else items
        return values

    def _to_python(self, name: str, x: Any) -> Any:
        if isinstance(x, np.floating):
            return float(str(x))  # 0.7 in FP32 becomes 0.7, not 0.699999988
        if isinstance(x, np.generic):
            return x.item()
        if len(x) > self.max_bytes:
            raise JetExportError(f"{name}: {len(x)} bytes; no more than {self.max_bytes} are taken.")
        try:
            return x.decode("utf-8")
        except UnicodeDecodeError as e:
            raise JetExportError(f"{name} is not UTF-8 (byte {e.start}).") from None

    def _refuse(self, sender: Any, code: str, message: str) -> None:
        error = self.pb.TritonError(" ".join(message.splitlines()), getattr(self.pb.TritonError, code))
        final = self.pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        sender.send(self.pb.InferenceResponse(error=error), flags=final)

    def _on_output(self, reply: Reply, output: Output) -> None:
        """Called by the engine's thread, or by the thread that cancels."""
        with self.lock:
            wake = (reply.fields.stream and not reply.pending) or output.finish_reason is not None
            reply.pending.append(output)
        if wake:
            self.ready.put(reply)

    def _send_loop(self) -> None:
        next_poll = next_metrics = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_poll:
                self._log_errors(self._poll_cancellations)
                self._log_errors(self._poll_shutdown)
                next_poll = time.monotonic() + POLL_INTERVAL
            if now >= next_metrics:
                self._log_errors(self._update_metrics)
                next_metrics = now + METRICS_INTERVAL
            try:
                reply = self.ready.get(timeout=max(next_poll - time.monotonic(), 0.0))
            except queue.Empty:
                continue
            if reply is None:
                return
            self._send(reply)

    def _update_metrics(self) -> None:
        self.metrics.update(self.batching.render_metrics())

    def _poll_cancellations(self) -> None:
        with self.lock:
            replies = [r for r in self.open if not r.cancelled and r.sequence is not None]
        for reply in replies:
            if reply.sender.is_cancelled():
                reply.cancelled = True
                self.batching.cancel(reply.sequence)  # type: ignore[arg-type]

    def _poll_shutdown(self) -> None:
        if self.control is None or not (self.control / "draining").exists():
            return
        if (self.control / "stop").exists():
            self.batching.close()
        with self.lock:
            idle = not self.open
        self._report_idle(idle)

    def _report_idle(self, idle: bool) -> None:
        if self.control is None or not self.control.is_dir():
            return
        now, before = ("idle", "busy") if idle else ("busy", "idle")
        (self.control / f"{self.instance}.{now}").write_text(str(os.getpid()))
        (self.control / f"{self.instance}.{before}").unlink(missing_ok=True)

    def _log_errors(self, task: Callable[[], None]) -> None:
        """Responses go on if `task` fails."""
        try:
            task()
        except Exception:
            log.exception("a background task of the model failed")

    def _send(self, reply: Reply) -> None:
        with self.lock:
            outputs, reply.pending = reply.pending, []
        if not outputs:  # sent with earlier ones
            return
        reason = outputs[-1].finish_reason
        if reason:
            with self.lock:
                self.open.discard(reply)
        try:
            self._respond(reply, outputs, reason)
        except Exception:
            log.exception("a response could not be sent; its request is cancelled")
            if not reason and reply.sequence is not None:
                self.batching.cancel(reply.sequence)

    def _respond(self, reply: Reply, outputs: list[Output], reason: str | None) -> None:
        flags = self.pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if reason else 0
        if reason in FAILURES:
            reply.sender.send(self.pb.InferenceResponse(error=self._failure(reply, reason)), flags=flags)
            return
        values = self._values(reply, outputs, reason)
        tensors = [
            self.pb.Tensor(name, np.array(value if isinstance(value, list) else [value], KINDS[name]))
            for name, value in values.items()
            if name in reply.outputs
        ]
        reply.sender.send(self.pb.InferenceResponse(tensors), flags=flags)

    def _failure(self, reply: Reply, reason: str) -> Any:
        failure = FAILURES[reason]
        code, message = "UNAVAILABLE" if failure.status == 503 else "INTERNAL", failure.message
        if reply.cancelled:
            code, message = "CANCELLED", "The request was cancelled."
        return self.pb.TritonError(message, getattr(self.pb.TritonError, code))

    def _values(self, reply: Reply, outputs: list[Output], reason: str | None) -> dict[str, Any]:
        """Values of the output tensors by name: a list, or one value."""
        before = self._prompt_text(reply) if reply.with_prompt else ""
        reply.with_prompt = False
        tokens = [o.token for o in outputs if o.token is not None]
        reply.num_tokens += len(tokens)
        values: dict[str, Any] = {"text_output": before + "".join(o.text for o in outputs), "output_ids": tokens}
        scored = [(o.token, o.logprob) for o in outputs if o.token is not None and o.logprob]
        if reply.fields.params.logprobs is not None:
            values["output_log_probs"] = [p.chosen for _, p in scored]
            reply.cumulative_logprob += sum(values["output_log_probs"])
            values["cum_log_probs"] = values["cumulative_logprob"] = reply.cumulative_logprob
            values["logprobs"] = json.dumps([self._scored(token, p) for token, p in scored])
        if reason:
            values |= {
                "finish_reason": reason,
                "num_input_tokens": len(reply.prompt),
                "num_output_tokens": reply.num_tokens,
            }
        return values

    def _prompt_text(self, reply: Reply) -> str:
        text = reply.fields.text_input
        return self.batching.tokenizer.decode(reply.prompt) if text is None else text

    def _scored(self, token: int, logprob: Logprob) -> dict[int, dict[str, Any]]:
        ranks: dict[int, tuple[float, int | None]] = {t: (v, i + 1) for i, (t, v) in enumerate(logprob.top)}
        ranks.setdefault(token, (logprob.chosen, None))
        decode = self.batching.tokenizer.decode
        return {t: {"logprob": v, "rank": r, "decoded_token": decode([t])} for t, (v, r) in ranks.items()}


def serving_options(parameters: dict[str, str]) -> Serving:
    """The parameters of config.pbtxt that are named after Serving's fields; the other fields have their defaults."""
    names = [f.name for f in dataclasses.fields(Serving)]
    try:
        return Serving(**{name: json.loads(parameters[name]) for name in names if name in parameters})
    except ValueError as e:
        raise JetExportError(f"config.pbtxt: one of {', '.join(names)} is not a number ({e}).") from None


def use_device(args: dict[str, str], config: dict[str, Any]) -> None:
    """Use the one GPU that Triton gave this instance; on a CPU, this instance's share of the cores."""
    if args["model_instance_kind"] == "GPU":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        listed = [d for d in visible.split(",") if d]
        index = int(args["model_instance_device_id"])
        os.environ["CUDA_VISIBLE_DEVICES"] = listed[index] if listed else str(index)
    elif "OMP_NUM_THREADS" not in os.environ:
        instances = sum(g["count"] for g in config["instance_group"])
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // instances))
