"""The runtime needs only the Engine interface: batching, sessions, prefix cache and determinism, over ONNX."""

import pytest
import torch
from helpers.batching import among_others, distinct, repeats, tokens
from helpers.eager_bundle import mini_config
from helpers.onnx_models import engines

from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.model.jet_nemotron import random_model
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.llm import LLM
from jet_export.runtime.params import Params
from jet_export.runtime.tokenizer import ByteTokenizer

LIMITS = Limits(max_batch_size=3, max_seq_len=2 * PAGE, prefill_chunk=64)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The evaluator of the exported graph, and the model."""
    model = random_model(mini_config(), torch.float32, max_positions=LIMITS.max_seq_len)
    return engines(model, tmp_path_factory.mktemp("onnx"), LIMITS)


def test_continuous_batching_equals_the_model_alone(pair) -> None:
    onnx, eager = pair
    alone = LLM.over(eager, ByteTokenizer(), -1)
    rows = [(tokens(n, n), m) for n, m in ((70, 3), (5, 6), (100, 4), (1, 5))]
    batching = BatchingEngine(onnx, ByteTokenizer(), -1, Serving(token_budget=48, prefix_cache_bytes=0))
    running = []
    for row, new in rows:
        running.append(batching.submit(row, Params(new), lambda _: None, keep_logits=True))
        batching.step()
    while batching.step():
        pass
    for (row, new), served in zip(rows, running, strict=True):
        (expected,) = alone.generate([row], new, return_logits=True)
        assert served.tokens == expected.token_ids
        assert expected.logits is not None
        assert torch.allclose(torch.stack(served.logits), expected.logits, rtol=1e-3, atol=1e-4)
    assert batching.scheduler.pages.used == batching.scheduler.slots.used == 0


def test_a_session_continues_to_the_bit(pair, tmp_path) -> None:
    onnx, _ = pair
    llm, row = LLM.over(onnx, ByteTokenizer(), -1, fingerprint="mini"), tokens(80, 1)
    (whole,) = llm.generate([row], 5, return_logits=True)
    llm.save_session(llm.session(row), tmp_path / "s")
    llm.generate([tokens(90, 2)] * 2, 2)
    session = llm.load_session(tmp_path / "s")
    parts = [llm.generate([[]], n, return_logits=True, session=session)[0] for n in (2, 3)]
    logits = [p.logits for p in (*parts, whole) if p.logits is not None]
    assert len(logits) == 3 and torch.equal(torch.cat(logits[:2]), logits[2])


def test_a_prefix_hit_has_the_logits_of_the_miss(pair) -> None:
    batching = BatchingEngine(pair[0], ByteTokenizer(), -1, Serving())
    text = tokens(PAGE + 60, 3)
    miss = among_others(BatchingEngine(pair[0], ByteTokenizer(), -1, Serving(prefix_cache_bytes=0)), text, [], 0)
    among_others(batching, text[: PAGE + 20], [], 0)
    runs = [among_others(batching, text, [], 0) for _ in range(2)]
    assert batching.metrics.prefix_tokens == 2 * (PAGE + 20) and distinct(runs) == 1
    assert torch.allclose(torch.stack(runs[0].logits), torch.stack(miss.logits), rtol=1e-3, atol=1e-4)


def test_repeats_are_the_same_bits(pair) -> None:
    def make() -> BatchingEngine:
        return BatchingEngine(pair[0], ByteTokenizer(), -1, Serving(deterministic=True))

    assert distinct(repeats(make, tokens(70, 0), 4, longest=90)) == 1
