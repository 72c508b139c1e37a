"""A score of one's own for `jet-export search`: any function of a config and a point; higher is better.

    python examples/search_score.py                                    # the scores of the paper's nine points
    jet-export search --model jet-2b --scores examples/search_score.py:score --output searches/mine

This one is a guess to be replaced by measured accuracies: wider keys tell more items apart (recall grows with
log(head_k_dim)), and more parameters help a little.
"""

from __future__ import annotations

import math

from jet_export.bundle.memory import parameter_count
from jet_export.model.config import JetNemotronConfig
from jet_export.model.presets import jet_2b
from jet_export.search.points import Point, all_points
from jet_export.search.space import SPACES, read_space


def score(config: JetNemotronConfig, point: Point) -> float:
    keys = [config.jet_dims(i).head_k_dim for i, kind in enumerate(config.layer_types) if kind == "jet"]
    recall = sum(math.log2(k) for k in keys) / len(keys)
    return recall + 0.5 * parameter_count(config) / 1e9


def main() -> None:
    preset = jet_2b()
    space = read_space(SPACES / "paper.toml", preset)
    found = {str(p.sizes[0]): score(p.config(preset, space), p) for p in all_points(space, preset)}
    for sizes, value in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{sizes:<12} {value:.3f}")


if __name__ == "__main__":
    main()
