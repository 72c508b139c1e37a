"""benchmarks/serving/simulate_scale.py: every request of a small load is simulated, and its time is given."""

from helpers.scripts import load_script


def test_a_small_load() -> None:
    found = load_script("serving/simulate_scale.py").run(40, 2, "least")
    assert (found["requests"], found["replicas"]) == (40, 2) and found["cpu_seconds"] > 0
    assert 35 <= found["summary"]["requests"] <= 40  # but for those longer than the engine takes
