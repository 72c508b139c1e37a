"""Step times fitted to a table: its own steps, sums over runs of steps, and the H200's serving from its table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.paths import BENCHMARKS
from helpers.scripts import load_script

from jet_export.bench.predict import find_table
from jet_export.bench.prompt_calls import PromptCall
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.model.hub import load_config
from jet_export.simulate.engine import model_engine
from jet_export.simulate.step_times import DecodeTimes, FittedTimes, PromptTimes, Window, fit_times, prefill_call
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import DATA

H200 = DATA / "measured" / "h200" / "bench-latency-jet-2b-bf16.json"


DTYPES = Dtypes.named(model="bfloat16", kv_cache="bfloat16", state="float32")


def fitted(measured: Path | None = H200, precision: str = "bf16") -> FittedTimes:
    return fit_times(find_table("jet-2b", precision, measured), load_config("jet-2b"), DTYPES)


@pytest.mark.parametrize("measured, precision", [(H200, "bf16"), (None, "fp8"), (None, "bf16")])
def test_the_tables_steps_come_out_of_the_fit(measured: Path | None, precision: str) -> None:
    fit = fitted(measured, precision)
    for row in fit.table.rows:
        held = row.context + row.new_tokens / 2
        step = fit.times.decode.total(row.batch, row.batch * held)
        assert step == pytest.approx(row.step_seconds, rel=0.08), row
        seconds, tokens, _ = prefill_call(row)
        if tokens >= 1024:  # a short call is bound by the host, which the table has few of
            prompts = [(0, row.context)] * round(tokens / row.context) if row.context <= row.chunk else None
            call = fit.times.mixed(prompts or [(row.context // 2, row.chunk)] * round(tokens / row.chunk), 0, 0)
            assert call == pytest.approx(seconds, rel=0.2), row


def test_a_run_of_steps_takes_the_sum_of_its_steps() -> None:
    decode = DecodeTimes(
        fixed=1.0, fixed_alone=0.5, sequence=0.1, sequence_alone=0.2, token=0.01, window=Window(token=0.03, size=20)
    )
    for sequences, held, steps in ((1, 5.0, 40), (3, 41.0, 7), (3, 41.0, 30), (2, 80.0, 9)):
        single = sum(decode.total(sequences, held + sequences * i) for i in range(steps))
        assert decode.total(sequences, held, steps) == pytest.approx(single)


def test_a_mixed_step_reads_the_weights_once() -> None:
    times = fitted().times
    prompt, decode = times.mixed([(0, 512)], 0, 0), times.plain(32, 32 * 640)
    mixed = times.mixed([(0, 512)], 32, 32 * 640)
    assert max(prompt, decode) < mixed < prompt + decode - 0.8 * times.decode.fixed


def test_mixed_steps_come_out_of_prompt_calls_and_decode_steps() -> None:
    """All measured on one H200: a prompt's calls alone, the table's decode steps, and both in one step."""
    result = json.loads((BENCHMARKS / "results" / "h200" / "mixed-step-jet-2b-bf16.json").read_text())
    alone = {r["prompt_tokens"]: r["times"]["prompt alone"]["device_ms"] for r in result["rows"]}
    table = find_table("jet-2b", "bf16", H200)
    table = replace(table, prompt_calls=tuple(PromptCall(tokens=n, ms=ms) for n, ms in alone.items()))
    fit = fit_times(table, load_config("jet-2b"), DTYPES)
    assert fit.gaps(sequences=64, context=4000, prompt=4096) == []
    for n, ms in alone.items():
        assert fit.times.mixed([(0, n)], 0, 0) == pytest.approx(1e-3 * ms)
    off = {}
    for row in result["rows"]:
        n, decoding = row["prompt_tokens"], row["decoding"]
        mixed = fit.times.mixed([(0, n)], decoding, decoding * result["held"])
        off[n, decoding] = 1e3 * mixed / row["times"]["mixed"]["device_ms"] - 1
    assert max(map(abs, off.values())) < 0.1, off


def test_prompt_calls_are_linear_between_those_known_and_go_on_beyond() -> None:
    times = PromptTimes(known=((64.0, 2.0), (128.0, 3.0), (1088.0, 18.0)))
    assert [times.seconds(n) for n in (1, 64, 96, 128, 608, 1088, 2112)] == [2, 2, 2.5, 3, 10.5, 18, 34]
    assert times.left_out_errors() == (0.0,)


def test_what_the_table_lacks_is_said() -> None:
    fit = fitted()
    (calls,) = fit.gaps(sequences=64, context=4000, prompt=4096)
    assert calls.startswith("no prompt calls as serving makes them")
    many, _ = fit.gaps(sequences=65, context=4000, prompt=100)
    assert many == "65 sequences at once: beyond the table's largest, 64: extrapolated"
    assert "off by" in "\n".join(fit.lines())
    with pytest.raises(
        JetExportError, match=r"simulate: .*latency-jet-2b-bf16\.json has no measured table of jet-2b fp8"
    ):
        model_engine("jet-2b", measured=H200, fp8=True)


def test_serving_on_an_h200_comes_out_of_its_table() -> None:
    """Both were measured on that GPU with this runtime: 256 requests at once over 64 slots (workload.py)."""
    result = json.loads((BENCHMARKS / "results" / "h200" / "workload-jet-2b-bf16.json").read_text())
    engine = model_engine("jet-2b", limits=Limits(**result["limits"]), measured=H200)
    (row,) = load_script("serving/simulate_check.py").rows_of(result, engine)
    assert {name: abs(v["off"]) < 0.15 for name, v in row.items() if name != "part"} == {
        "tokens/s": True,
        "ttft_ms p50": True,
    }
