"""Bytes and operations of a step, against figures worked out by hand."""

import pytest
import torch

from jet_export.bench.measure import Case
from jet_export.bench.roofline import (
    FP8,
    Peaks,
    Roofline,
    Weights,
    count_weights,
    mixer_flops,
    spaced_bytes,
    step_bytes,
)
from jet_export.bundle.memory import weight_bytes
from jet_export.model.cache import PAGE, state_specs
from jet_export.model.presets import jet_2b, jet_4b, qwen3_1_7b, qwen3_5_4b
from jet_export.model.weights import checkpoint_layout

BF16 = torch.bfloat16


def sizes(config, fp8: bool = False) -> dict:
    """A bundle's tensors, by the layout of its checkpoint."""
    out: dict = {}
    for s in checkpoint_layout(config).values():
        _, n, _ = out.get(s.param, (BF16, 0, 0))
        dtype = FP8 if fp8 and s.param.startswith("layers.") and len(s.shape) == 2 else BF16
        out[s.param] = dtype, n + torch.Size(s.shape).numel(), len(s.shape)
    return {**out, "cos_sin": (BF16, 1000, 2)}


def test_jet_2b_at_64k_and_batch_128_moves_the_bytes_worked_out_by_hand() -> None:
    """KV 17.2 GB, fp32 states 7.25 (read and written), weights 3.9, windows 0.3: 28.7 GB, 13,500 tok/s at 3.02 TB/s."""
    c = jet_2b()
    device = roofline(count_weights(sizes(c)), Peaks(3.02e12, {}))
    b = device.step_bytes(128, 65536)
    gigabytes = [x / 1e9 for x in (b.kv_full, b.recurrent_states, b.weights, b.kv_window)]
    assert gigabytes == pytest.approx([17.2, 7.25, 3.9, 0.3], abs=0.05)
    assert b.total / 1e9 == pytest.approx(28.7 + b.conv_states / 1e9, abs=0.1)
    assert 128 / device.decode_seconds(128, 65536) == pytest.approx(13_500, rel=0.02)


def test_weights_read_are_the_models_and_not_the_rope_table() -> None:
    for c in (jet_2b(), jet_4b(), qwen3_1_7b()):
        w = count_weights(sizes(c))
        assert w.read == pytest.approx(weight_bytes(c, BF16, False), rel=1e-5)
        assert w.resident == w.read + 2000


def test_an_output_projection_of_its_own_replaces_the_embedding() -> None:
    tied = {"embed_tokens.weight": (BF16, 100, 2), "norm.weight": (BF16, 10, 1)}
    assert count_weights(tied).read == 220
    assert count_weights({**tied, "lm_head.weight": (FP8, 100, 2)}).read == 120
    assert count_weights({**tied, "lm_head.weight": (FP8, 100, 2)}).resident == 320
    assert count_weights({**tied, "mtp.fc.weight": (FP8, 100, 2)}).read == 220


def test_products_of_jet_2b() -> None:
    """3.46 GFLOP a token in the layers' products."""
    (products,) = count_weights(sizes(jet_2b())).products.values()
    assert 2 * products / 1e9 == pytest.approx(3.46, abs=0.1)


def test_windows_and_caches_stop_growing_where_they_should() -> None:
    c = jet_2b()
    specs = state_specs(c, BF16)
    short, long = step_bytes(c, specs, 0, 4, 1000), step_bytes(c, specs, 0, 4, 2000)
    assert long.kv_full == 2 * short.kv_full and long.recurrent_states == short.recurrent_states
    assert long.kv_window == pytest.approx(short.kv_window * 1152 / 1000, rel=1e-6)
    assert step_bytes(c, specs, 0, 4, 9000).kv_window == long.kv_window
    row = next(s for s in specs if s.rows == "pages").row_bytes
    assert short.kv_full == 4 * 2 * row // PAGE * 1000


@pytest.mark.parametrize("interval", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_state_written_once_in_an_interval_saves_its_writes_less_the_tokens_beside_it(interval, dtype) -> None:
    """Of a step, on average: (L - 1) / L of a state are not written; (L - 1) / 2 rows [K + V + 4] fp32 are read and
    (L - 1) / L written. The roofline that writes states at every token, which that of L = 1 is, has the bytes of a
    bundle without an interval and drafts."""
    c = jet_2b()
    specs = state_specs(c, BF16, state_dtype=dtype, interval=interval, rollback=5)
    plain, every = (step_bytes(c, s, 7, 4, 1000) for s in (state_specs(c, BF16, state_dtype=dtype), specs))
    spaced = spaced_bytes(every, specs, 4, interval)
    assert every == plain == spaced_bytes(every, specs, 4, 1) and every.step_buffers == 0
    states = rows = 0
    for i, kind in enumerate(c.layer_types):
        if kind == "jet":
            H, K, V = c.jet_dims(i)
            states, rows = states + H * K * V * dtype.itemsize, rows + 4 * H * (K + V + 4)
    L = interval
    saved = 4 * (states * (L - 1) / L - rows * ((L - 1) / 2 + (L - 1) / L))
    assert every.total - spaced.total == pytest.approx(saved, abs=2)
    assert every.recurrent_states == 4 * 2 * states and spaced.conv_states == plain.conv_states
    assert spaced.recurrent_states == pytest.approx(4 * states * (1 + 1 / L), abs=1)


def test_an_interval_of_one_is_the_roofline_of_today() -> None:
    device = roofline(Weights(read=7, resident=7, products={}), Peaks(1e12, {}))
    assert device.step_bytes(4, 1000, 1) == device.step_bytes(4, 1000)
    assert device.decode_seconds(4, 1000, 1) == device.step_bytes(4, 1000).total / 1e12


def test_attention_of_a_prefill_is_quadratic_and_windows_are_not() -> None:
    c = qwen3_1_7b()
    assert mixer_flops(c, 2000) / mixer_flops(c, 1000) == pytest.approx(4, rel=2e-3)
    assert mixer_flops(c, 3) == 28 * 4 * 128 * 16 * 6
    jet = jet_2b()
    per_token = [mixer_flops(jet, n) / n for n in (4096, 8192)]
    assert per_token[0] < per_token[1] < 2 * per_token[0]


def test_a_gated_delta_nets_bytes_and_operations_are_those_worked_out_by_hand() -> None:
    """Qwen3.5-4B: 24 layers of 32 value and 16 key heads, K = V = 128; 8 of gated attention, 4 KV heads of 256."""
    c, n = qwen3_5_4b(), 4096
    b = step_bytes(c, state_specs(c, BF16, rollback=4, hidden=True), 0, 1, n)
    assert b.recurrent_states == 2 * 24 * 32 * 128 * 128 * 4
    assert b.conv_states == 2 * 24 * 3 * (2 * 16 * 128 + 32 * 128) * 2  # q, k and the values; rows to take back are not
    assert (b.kv_full, b.kv_window) == (8 * 2 * 4 * 256 * 2 * n, 0)
    (products,) = count_weights(sizes(c)).products.values()
    gdn, attention = 2560 * (2 * 2048 + 2 * 4096 + 64) + 4096 * 2560, 2560 * (2 * 4096 + 2 * 1024) + 4096 * 2560
    assert products == 24 * gdn + 8 * attention + 32 * 3 * 2560 * 9216
    within = 64 * 2 * (2 * 16 * 128 + 32 * (128 + 2 * 128))  # of a chunk: q and k with k once for two value heads
    states = 32 * 6 * 128 * 128
    assert mixer_flops(c, n) == 24 * n * (within + states) + 8 * 4 * 256 * 16 * n * (n + 1) / 2


def roofline(weights: Weights, peaks: Peaks) -> Roofline:
    c = jet_2b()
    return Roofline(config=c, dtype=BF16, specs=state_specs(c, BF16), weights=weights, peaks=peaks)


def test_the_slower_of_products_and_bytes_bounds_a_prefill() -> None:
    weights = Weights(read=10**9, resident=10**9, products={BF16: 10**9})
    case = Case(batch=1, context=1000, chunk=500)
    fast_memory = roofline(weights, Peaks(1e20, {BF16: 1e12}))
    assert fast_memory.prefill_seconds(case) > 2 * 1e9 * 1000 / 1e12
    fast_products = roofline(weights, Peaks(1e9, {BF16: 1e30}))
    moved = sum(step_bytes(jet_2b(), fast_products.specs, 0, 1, n).total for n in (0, 500))
    assert fast_products.prefill_seconds(case) == pytest.approx((2e9 + moved) / 1e9)


def test_fp8_products_are_faster_where_the_device_has_them() -> None:
    weights, case = Weights(read=0, resident=0, products={FP8: 10**9}), Case(batch=1, context=100, chunk=100)
    slow = roofline(weights, Peaks(1e20, {BF16: 1e12, torch.float32: 1e12})).prefill_seconds(case)
    fast = roofline(weights, Peaks(1e20, {BF16: 1e12, FP8: 2e12})).prefill_seconds(case)
    assert slow - fast == pytest.approx(2 * 10**9 * 100 / 2e12)
