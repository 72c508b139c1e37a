"""The least loaded replica is the first with the lowest load, whatever has come, changed and gone."""

import random

import pytest

from jet_export.simulate.loads import Loads


@pytest.mark.parametrize("seed", range(3))
def test_the_least_is_that_of_a_look_at_all(seed: int) -> None:
    rng, loads, born = random.Random(seed), Loads(), 0
    for _ in range(3000):
        if not loads or rng.random() < 0.05:
            loads[born], born = 0, born + 1
        replica = rng.choice(list(loads))
        if rng.random() < 0.03 and len(loads) > 1:
            loads.pop(replica)
        else:
            loads[replica] = max(0, loads[replica] + rng.choice([-1, 1]))
        assert loads.least() == min(loads, key=loads.__getitem__)
