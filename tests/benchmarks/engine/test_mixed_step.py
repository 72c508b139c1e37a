"""benchmarks/engine/mixed_step.py on a CPU: every call runs on the states that it says."""

from typing import Any

from helpers.eager_bundle import eager_engine
from helpers.scripts import load_script

from jet_export.bundle.limits import Limits


def test_every_call_is_timed(monkeypatch) -> None:
    script = load_script("engine/mixed_step.py")
    made, runner_of = [], script.runner_of

    def kept(*args: Any) -> Any:
        made.append(runner_of(*args))
        return made[-1]

    monkeypatch.setattr(script, "runner_of", kept)
    engine = eager_engine(Limits(max_batch_size=8, max_seq_len=400, prefill_chunk=64))
    row = script.measure(engine, 20, 3, 150, 1)
    assert set(row["times"]) == {"mixed", "two calls", "prompt alone", "decode alone"}
    assert all(t["device_ms"] > 0 and t["host_ms"] > 0 for t in row["times"].values())
    assert made[0].context_lens == [0, 151, 151, 151]  # the last call let three decode
    assert "20 +   3: mixed " in script.line_of(row)
