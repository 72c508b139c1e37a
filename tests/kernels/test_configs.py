"""The committed table of configurations: its lookups, and that the kernels use them."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import triton

from jet_export.kernels import attention_decode, attention_prefill, configs, gated_delta_rule_chunk
from jet_export.kernels import gated_delta_rule_decode as delta_decode
from jet_export.utils.errors import JetExportError

BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
DTYPES = [(d, c) for d in (BF16, torch.float16, FP32) for c in (d, FP8)]
HEAD_DIMS = [16, 32, 64, 80, 96, 112, 128, 144, 256]
PAGES = [16, 32, 64, 128, 256]


def committed(op: str) -> list[configs.Rule]:
    return [r for r in configs.table() if r.op == op and r.sm is None]


# The kernels' choices before there was a table; rules for any SM must keep giving them.


def old_attention_decode(head_dim, dtype, cache_dtype, page):
    if dtype == torch.float32:
        return (min(page, 16), 4, 3, 8)
    if cache_dtype == torch.float8_e4m3fn:
        return (min(page, 64), 4, 4, 8)
    return (min(page, 128 if head_dim <= 128 else 64), 4, 2, 8)


def old_attention_prefill(head_dim, dtype, cache_dtype, page):
    if dtype == torch.float32:
        return (32, min(page, 32 if head_dim <= 128 else 16), 8, 1)
    if head_dim > 128:
        return (64, min(page, 64), 8, 2)
    if cache_dtype == torch.float8_e4m3fn:
        return (128, min(page, 128), 8, 3)
    return (64, min(page, 64), 4, 3)


def old_chunk(dtype, head_k_dim):
    BK = max(16, triton.next_power_of_2(head_k_dim))
    if dtype == torch.float32:
        prepare = {"BT": 16, "BK": BK, "num_warps": 4, "num_stages": 1}
        scan = {"BT": 16, "BK": BK, "BV": 16, "STAGES": 1, "num_warps": 4}
    else:
        wide = BK > 128
        prepare = {"BT": 64, "BK": BK, "num_warps": 8 if wide else 4, "num_stages": 1}
        scan = {"BT": 64, "BK": BK, "BV": 64, "STAGES": 1 if wide else 2, "num_warps": 8 if wide else 4}
    return prepare, scan


def old_delta_decode(head_k_dim, head_v_dim):
    NV = triton.next_power_of_2(triton.cdiv(head_v_dim, 32))
    return {"BK": triton.next_power_of_2(head_k_dim), "BV": 32, "NV": NV, "num_warps": 4}


@pytest.fixture
def any_sm():
    with configs.use_sm(None):
        yield


def test_attention_is_configured_as_before_the_table(any_sm) -> None:
    for head_dim, (dtype, cache), page in itertools.product(HEAD_DIMS, DTYPES, PAGES):
        for group in (1, 2, 6, 8):
            got = attention_decode.decode_config(head_dim, group, dtype, cache, page)
            assert tuple(got) == old_attention_decode(head_dim, dtype, cache, page)
            prefill = attention_prefill.prefill_config(head_dim, group, dtype, cache, page)
            assert tuple(prefill) == old_attention_prefill(head_dim, dtype, cache, page)


def test_the_delta_rule_is_configured_as_before_the_table(any_sm) -> None:
    for dtype, K in itertools.product((BF16, torch.float16, FP32), range(16, 257, 16)):
        prepare, scan = old_chunk(dtype, K)
        scan |= {"MIN_HEADS": 0, "MAX_HEADS": 0}
        assert gated_delta_rule_chunk.chunk_config(dtype, K, 256) == (prepare, [scan])
        for V, state in itertools.product((16, 40, 64, 256, 512, 576), (FP32, BF16)):
            assert delta_decode.decode_config(torch.empty(0, dtype=state), K, V) == old_delta_decode(K, V)


def test_the_scan_has_two_forms_where_they_differ() -> None:
    """On SM 9.0 wide tiles take over when the programs of the narrow ones no longer all run at the same time."""
    with configs.use_sm(90):
        _, (narrow, wide) = gated_delta_rule_chunk.chunk_config(BF16, 96, 256)
        one_wave = configs.lookup("delta_rule_scan", dtype=BF16, head_k_dim=96, many_heads=False)["one_wave"]
    assert (narrow["BV"], wide["BV"], one_wave) == (64, 128, 132)
    assert (narrow["MIN_HEADS"], narrow["MAX_HEADS"]) == (0, one_wave // 4)
    assert (wide["MIN_HEADS"], wide["MAX_HEADS"]) == (one_wave // 4 + 1, 0)


@pytest.mark.parametrize("sm", [None, 80, 86, 89, 100, 120])
def test_the_scan_has_one_form_on_other_sms(sm) -> None:
    with configs.use_sm(sm):
        assert len(gated_delta_rule_chunk.chunk_config(BF16, 96, 256)[1]) == 1


def test_the_other_kernels_are_configured_as_before_the_table(any_sm) -> None:
    tile = {"BT": 16, "BD": 64, "num_warps": 4}
    assert configs.lookup("dynamic_conv", dtype=BF16, conv_size=4, static=False) == tile
    assert configs.lookup("gated_rms_norm", dtype=BF16, head_v_dim=256) == {"BR": 16}
    assert configs.lookup("rope_append", dtype=BF16, cache_dtype=FP8, head_dim=128) == {"BT": 16, "num_warps": 4}


def test_every_op_ends_with_a_rule_without_conditions() -> None:
    assert all(not committed(op)[-1].where for op in configs.OPS)


def rule(**changes) -> dict:
    use = {"BR": 8}
    return {"op": "gated_rms_norm", "sm": None, "where": {}, "use": use, "source": "here", **changes}


def found(rules: list[dict], sm: int | None, **facts) -> int:
    return configs.find(configs.parse(rules), "gated_rms_norm", sm, facts).use["BR"]


def test_rules_of_the_sm_come_before_those_of_any_sm_and_the_first_applies() -> None:
    rules = [rule(), rule(sm=90, where={"head_v_dim": 64}, use={"BR": 2}), rule(sm=90, where={}, use={"BR": 4})]
    assert [found(rules, sm, head_v_dim=v) for sm, v in ((90, 64), (90, 65), (89, 64), (None, 64))] == [2, 4, 8, 8]


def test_ranges_are_inclusive() -> None:
    rules = [rule(where={"head_v_dim": {"min": 32, "max": 64}}, use={"BR": 1}), rule()]
    assert [found(rules, None, head_v_dim=v) for v in (31, 32, 64, 65)] == [8, 1, 1, 8]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (rule(op="softmax"), "rule 0 is not one: KeyError"),
        ({"op": "gated_rms_norm"}, "rule 0 is not one: KeyError"),
        (rule(where={"batch": 4}), r"rule 0 of gated_rms_norm speaks of \['batch'\]"),
        (rule(use={"BR": 8, "num_warps": 4}), "a configuration: BR"),
        (rule(use={}), "a configuration: BR"),
    ],
)
def test_a_damaged_table_is_refused_by_rule(bad, message) -> None:
    with pytest.raises(JetExportError, match=message):
        configs.parse([bad])


def test_an_uncovered_case_is_named() -> None:
    with pytest.raises(JetExportError, match="no rule of gated_rms_norm holds for"):
        found([rule(sm=90)], 89, head_v_dim=4)


def test_an_override_ends(any_sm) -> None:
    with pytest.raises(RuntimeError), configs.override("gated_rms_norm", {"BR": 3}):
        assert configs.lookup("gated_rms_norm", dtype=BF16, head_v_dim=4) == {"BR": 3}
        raise RuntimeError
    assert configs.lookup("gated_rms_norm", dtype=BF16, head_v_dim=4) == {"BR": 16}


def test_the_sm_in_use_is_the_gpus_unless_named(monkeypatch) -> None:
    monkeypatch.setattr(configs, "_device_sm", lambda: 90)
    assert configs.current_sm() == 90
    with configs.use_sm(89):
        assert configs.current_sm() == 89
    assert configs.current_sm() == 90


def test_a_library_for_one_sm_takes_its_rules_and_for_several_those_of_any(monkeypatch, tmp_path) -> None:
    """One set of launches serves all SMs of a plugin library."""
    from jet_export.plugins import compile_kernels
    from jet_export.plugins.cases import JetBlockCase

    seen: list[int | None] = []

    def trace(self, form: int) -> SimpleNamespace:
        seen.append(configs.current_sm())
        return SimpleNamespace(launches=[])

    case = JetBlockCase(2, 32, 64, 4, "bfloat16", "float32")
    monkeypatch.setattr(JetBlockCase, "trace", trace)
    monkeypatch.setattr(configs, "_device_sm", lambda: 90)
    monkeypatch.setattr(compile_kernels, "emit", lambda traces, images: "")
    compile_kernels.compile_cases([case], [89], tmp_path)
    compile_kernels.compile_cases([case], [89, 90], tmp_path)
    assert seen == [89, 89, None, None]
