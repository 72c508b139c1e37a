"""benchmarks/serving/speculation.py: drafts are accepted at the stated share, and answers are as recorded."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.eager_bundle import eager_engine
from helpers.scripts import load_script

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.runtime.drafts import LookupProposer
from jet_export.runtime.replay import ReplayProposer
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=2, max_seq_len=128, prefill_chunk=64)


@pytest.fixture(scope="module")
def script():
    return load_script("serving/speculation.py")


def test_a_share_is_that_of_independent_tokens(script) -> None:
    assert script.probability(1.0, 4) == pytest.approx(1.0)
    p = script.probability(0.8, 4)
    assert (p + p**2 + p**3 + p**4) / 4 == pytest.approx(0.8)


def test_decisive_weights_hold_the_record_at_any_acceptance(script, device) -> None:
    """Each answer repeats its prompt's last token, drafts that are all wrong included, and of drafts as right as stated
    that share is accepted. A step's states are still those of different sequences."""
    engine = EagerEngine(eager_engine(LIMITS, device=device, dtype=torch.bfloat16).model, LIMITS, rollback=5)
    before = script.embeddings(engine).clone()
    factor = script.make_decisive(engine)
    assert factor > 1 and torch.equal(script.embeddings(engine), before * factor)
    assert 256 <= script.embeddings(engine).float().square().mean().sqrt() < 512
    assert script.make_decisive(engine) == 1
    prompts = [[3, 9, 4], [5, 7]]
    bench = script.Bench(engine=engine, tokenizer=ByteTokenizer(), prompts=prompts, new=17, temperature=0.7, drafts=4)
    right = script.probability(0.8, 4)
    variants = {"0": (ReplayProposer([], 0.0, 128), True), "0.8": (ReplayProposer([], right, 128), True)}
    found = script.measure(bench, variants, repeats=1)
    assert all(row["answers_as_recorded"] == 2 for row in found.values())
    assert found["0"]["rate"] == 0.0 and found["0"]["steps"] == found["plain"]["steps"]
    assert found["0.8"]["rate"] == pytest.approx(0.8, abs=0.15)
    short = replace(bench, new=3)
    recorded = short.run(short.batching(None, False)).answers
    assert [set(a.tokens) for a in recorded] == [{4}, {7}]


def test_weights_are_decisive_for_random_ones_and_replayed_drafts(script) -> None:
    engine = eager_engine(LIMITS)

    def said(inputs: str, **options) -> str:
        manifest = SimpleNamespace(build={"inputs": {"weights": inputs}})
        return script.prepared(engine, manifest, SimpleNamespace(**{"weights": None, "code": None, **options}))

    own = [said("sha256 of a checkpoint"), said("random, seed 0", code=["x.py"]), said("random", weights="own")]
    assert own == ["the bundle's own"] * 3
    assert said("random, seed 0").startswith("decisive: the embeddings times ")
    assert said("sha256 of a checkpoint", weights="decisive").startswith("decisive: the embeddings times 1,")
    engine.config = replace(engine.config, tie_word_embeddings=False)
    with pytest.raises(JetExportError, match=r"output projection is not its embeddings\.\n.*--weights own"):
        said("random")


def test_every_variant_is_measured_beside_plain_decoding(script, device) -> None:
    engine = EagerEngine(eager_engine(LIMITS, device=device).model, LIMITS, rollback=5)
    bench = script.Bench(
        engine=engine, tokenizer=ByteTokenizer(), prompts=[[5] * 9, [1, 2, 3]], new=12, temperature=0.7, drafts=4
    )
    right = ReplayProposer([], 1.0, 128)
    found = script.measure(bench, {"right": (right, True), "lookup": (LookupProposer(), True)}, repeats=1)
    assert set(found) == {"plain", "right", "lookup"}
    assert all(row["answers_as_recorded"] == 2 for row in found.values())
    assert found["right"]["rate"] == 1.0 and found["right"]["steps"] < found["plain"]["steps"] / 2
    assert found["plain"]["of_plain"] == 1.0 and "rate" not in found["plain"]
