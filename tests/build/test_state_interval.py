"""`--state-interval`: a number, or what the table of configurations says of the GPU."""

from typing import Any

import pytest
import torch
from helpers.eager_bundle import mini_config
from helpers.paths import ROOT

from jet_export.build import plan as plans
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.build.state_interval import MOST, parse_interval, table_interval
from jet_export.kernels import configs
from jet_export.model.hub import load_config
from jet_export.utils.errors import JetExportError


def test_a_number_or_auto() -> None:
    assert [parse_interval(text) for text in ("1", "8", str(MOST), "auto")] == [1, 8, MOST, None]
    for text in ("0", str(MOST + 1), "-1", "many", "", "8.0"):
        with pytest.raises(JetExportError, match=f"--state-interval {text}: no number of tokens from 1 to {MOST}"):
            parse_interval(text)


def test_the_table_names_what_it_was_measured_with() -> None:
    for model in ("jet-2b", "jet-4b"):
        for sm in (None, 80, 89, 90, 120):
            found = table_interval(load_config(model), torch.float32, sm, 64)
            assert 1 <= found.tokens <= MOST
            assert (found.source == "not measured") == (found.tokens == 1) or (ROOT / found.source).is_file()
    hopper = table_interval(load_config("jet-2b"), torch.float32, 90, 64)
    assert hopper.tokens > 1 and (ROOT / hopper.source).is_file()
    attention = mini_config(layer_types=["attn"] * mini_config().num_hidden_layers)
    assert table_interval(attention, torch.float32, 90, 64).tokens == 1


def test_the_largest_batch_may_decide(monkeypatch) -> None:
    rows: list[dict[str, Any]] = [
        {"where": {"max_batch_size": {"min": 64}}, "sm": 90, "use": {"tokens": 8}},
        {"where": {}, "sm": None, "use": {"tokens": 1}},
    ]
    rules = configs.parse([{"op": "state_interval", "source": "here", **row} for row in rows])
    monkeypatch.setattr(configs, "table", lambda: rules)
    found = [table_interval(load_config("jet-2b"), torch.float32, 90, n).tokens for n in (1, 63, 64, 1024)]
    assert found == [1, 1, 8, 8]


@pytest.mark.parametrize(("asked", "tokens"), [(None, 8), (4, 4), (1, 1)])
def test_a_plan_has_the_interval_of_its_gpu(monkeypatch, asked: int | None, tokens: int) -> None:
    monkeypatch.setattr(plans, "host_target", lambda device: {"device": "cuda", "arch": "sm_90"})
    options = BuildOptions(
        model="jet-2b", random_weights=True, backend="inductor", state_interval=asked, max_batch_size=64
    )
    plan = make_plan(options)
    assert plan.dtypes.state_interval == plan.interval.tokens == tokens
    assert bool(plan.interval.source) == (asked is None)


def test_engines_that_write_every_token_do_so_with_auto_too() -> None:
    plan = make_plan(BuildOptions(model="jet-tiny", backend="onnx", device="cpu", state_interval=None))
    assert plan.dtypes.state_interval == 1
