"""The compiled FP8 bundle: batch invariance, continued sessions and prefix hits, to the bit."""

import gc
from typing import Any

import pytest
import torch
from helpers.batching import among_others, distinct, repeats, tokens
from helpers.bundles import tiny_bundle

from jet_export import LLM, AsyncLLM, Serving
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.params import Params
from jet_export.utils.errors import JetExportError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def llm(bundle):
    return LLM(bundle, check=False)


def batching(llm, **serving) -> BatchingEngine:
    return BatchingEngine(llm.engine, llm.tokenizer, -1, Serving(**serving))


def test_twenty_repeats_are_the_same_bits(llm) -> None:
    runs = repeats(lambda: batching(llm, deterministic=True), tokens(100, 0), 20)
    assert distinct(runs) == 1
    loose = repeats(lambda: batching(llm), tokens(100, 0), 4)
    print(f"without: {distinct(loose)} different results in 4 runs")


def test_a_saved_session_continues_to_the_bit(llm, bundle, tmp_path) -> None:
    row = tokens(300, 1)
    (whole,) = llm.generate([row], 12, return_logits=True, ignore_eos=True)
    session = llm.session(row)
    llm.save_session(session, tmp_path / "s")
    other = LLM(bundle, check=False)
    other.generate([tokens(200, 2)] * 3, 2)
    session = other.load_session(tmp_path / "s")
    (a,) = other.generate([[]], 5, return_logits=True, ignore_eos=True, session=session)
    (b,) = other.generate([[]], 7, return_logits=True, ignore_eos=True, session=session)
    assert a.token_ids + b.token_ids == whole.token_ids
    assert a.logits is not None and b.logits is not None and whole.logits is not None
    assert torch.equal(torch.cat((a.logits, b.logits)), whole.logits)
    data = bytearray((tmp_path / "s").read_bytes())
    data[-1] ^= 1
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(JetExportError, match="sha256 differs"):
        other.load_session(tmp_path / "s")


def test_the_fingerprint_is_the_bundle_s(llm, bundle) -> None:
    assert AsyncLLM(bundle).fingerprint == llm.fingerprint != ""


def test_a_prefix_hit_gives_the_bits_of_the_miss(llm) -> None:
    prompt = tokens(700, 3)
    engine = batching(llm, prefix_cache_bytes=1 << 28)
    runs = [among_others(engine, prompt, [], 0) for _ in range(2)]
    assert engine.metrics.prefix_hits == 1 and engine.metrics.prefix_tokens == 512
    assert distinct(runs) == 1


def test_text_and_stop_strings_over_sessions(llm) -> None:
    session = llm.new_session()
    (first,) = llm.generate("def mean(values):\n    ", 12, ignore_eos=True, session=session)
    (second,) = llm.generate("\n\ndef", 12, ignore_eos=True, session=session)
    assert llm.tokenizer.decode(session.tokens) == "def mean(values):\n    " + first.text + "\n\ndef" + second.text
    heard: list[Any] = []
    engine = batching(llm)
    engine.submit(llm.tokenizer.encode("def "), Params(40, stop=("(",)), heard.append)
    while engine.step():
        pass
    assert "(" not in "".join(o.text for o in heard)


def test_a_deleted_engine_frees_its_weights(bundle) -> None:
    """bench and search load several engines in one process. A tensor kept elsewhere stays valid."""
    engine: Any = LLM(bundle, check=False).engine
    kept = engine.weights["layers.0.mlp.down_proj.weight"]
    values = kept.float().clone()
    storages = {n: w.untyped_storage() for n, w in engine.weights.items()}
    del engine
    gc.collect()
    held = {n for n, s in storages.items() if torch._C._storage_Use_Count(s._cdata) > 1}
    assert held == {"layers.0.mlp.down_proj.weight"}
    assert torch.equal(kept.float(), values)
