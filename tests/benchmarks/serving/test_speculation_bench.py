"""benchmarks/serving/speculation.py: drafts are accepted at the stated share, and answers are as recorded."""

import pytest
from helpers.eager_bundle import eager_engine
from helpers.scripts import load_script

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.runtime.drafts import LookupProposer
from jet_export.runtime.replay import ReplayProposer
from jet_export.runtime.tokenizer import ByteTokenizer

LIMITS = Limits(max_batch_size=2, max_seq_len=128, prefill_chunk=64)


@pytest.fixture(scope="module")
def script():
    return load_script("serving/speculation.py")


def test_a_share_is_that_of_independent_tokens(script) -> None:
    assert script.probability(1.0, 4) == pytest.approx(1.0)
    p = script.probability(0.8, 4)
    assert (p + p**2 + p**3 + p**4) / 4 == pytest.approx(0.8)


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
