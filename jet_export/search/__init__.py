"""`jet-export search`: head sizes, precisions and layouts chosen from latency measured on engines of single layers.

space.py        the TOML file: what may be chosen
points.py       a choice, and the architecture that it is
constraints.py  why a point is refused before anything is built
cells.py        the engines that are measured: single layers, the base without layers, whole models
database.py     measurements, kept
work.py         cells built in parallel and measured alone, in processes of their own (worker.py)
compose.py      the whole model's latency from its layers'
scores.py       quality, by a proxy or from outside
sampling.py     which points are looked at: all of them, or Optuna's
run.py          one search from its options to its files (output.py, html.py)
"""
