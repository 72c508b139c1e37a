"""benchmarks/kernels/tune.py: what is chosen from times, and how the table of configurations changes."""

import json

import pytest
from helpers.scripts import load_script

from jet_export.kernels import configs
from jet_export.utils.errors import JetExportError


@pytest.fixture(scope="module")
def tune():
    return load_script("kernels/tune.py")


def rows() -> list[dict]:
    return json.loads(configs.TABLE.read_text())


def test_the_committed_table_is_as_the_script_writes_it(tune, tmp_path) -> None:
    tune.write_table(tmp_path / "t.json", rows())
    assert (tmp_path / "t.json").read_bytes() == configs.TABLE.read_bytes()


def test_candidates_are_configurations(tune) -> None:
    assert tune.CANDIDATES.keys() == configs.OPS.keys()
    for op, candidates in tune.CANDIDATES.items():
        assert all(c.keys() == configs.OPS[op][1] for c in candidates)


def test_a_new_rule_comes_before_the_ops_others_and_is_found_for_its_sm_only(tune) -> None:
    use = {"BV": 64, "num_warps": 8}
    where = {"state_dtype": "float32", "head_k_dim": 128, "head_v_dim": 256}
    new = {"op": "delta_rule_decode", "sm": 80, "where": where, "use": use, "source": "x"}
    table = configs.parse(tune.merge(rows(), [new]))
    assert len(table) == len(rows()) + 1
    assert configs.find(table, "delta_rule_decode", 80, where).use == use
    for sm, facts in ((80, {**where, "head_k_dim": 96}), (89, where), (None, where)):
        assert configs.find(table, "delta_rule_decode", sm, facts).use["BV"] == 32


def test_a_rule_of_the_same_case_is_replaced(tune) -> None:
    new = {"op": "gated_rms_norm", "sm": 90, "where": {"head_v_dim": 256}, "use": {"BR": 2}, "source": "x"}
    once = tune.merge(rows(), [new])
    assert tune.merge(once, [{**new, "use": {"BR": 4}}]) == [{**r, "use": {"BR": 4}} if r == new else r for r in once]


def test_a_broken_rule_is_not_written(tune) -> None:
    with pytest.raises(JetExportError, match="rule"):
        tune.merge(rows(), [{"op": "gated_rms_norm", "sm": 90, "where": {"rows": 1}, "use": {"BR": 2}, "source": ""}])


def test_a_configuration_is_changed_for_a_gain_over_all_workloads_only(tune) -> None:
    times = {"now": {"a": 1.0, "b": 1.0}, "mixed": {"a": 0.5, "b": 1.99}, "fast": {"a": 0.9, "b": 0.95}}
    assert tune.choose(times, "now") == ("fast", pytest.approx((0.9 * 0.95) ** 0.5))
    del times["fast"]
    assert tune.choose(times, "now") == ("now", 1.0)  # 0.3 % faster is noise
