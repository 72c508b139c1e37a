"""`jet-export search`: head sizes, precisions and layouts chosen by latency measured on engines of a few layers.

space.py        the TOML file: what may be chosen
points.py       a choice, and the architecture that it is
constraints.py  why a point is refused before anything is built
scores.py       a point's quality, by a proxy or from outside
sampling.py     which points are looked at: all of them, or those that Optuna proposes
spec.py         the command line's options, resolved and checked
state.py        what a search has found so far (evaluation.py: of one point)
search.py       a search: its spec and its state

cells.py        the engines that are measured: a few equal layers, the base without layers, whole models
measurer.py     builds cells in parallel and measures them one at a time (locks.py)
executor.py     the subprocesses that do so (processes.py, worker.py)
ray_executor.py nodes of a Ray cluster that do so instead (ray_cluster.py, ray_node.py)
database.py     the latencies, kept (machine.py: of which machine)
predict.py      the whole model's latency from its layers'
choose.py       the Pareto front and the choice
run.py          runs a search (directory.py: its output directory)

output.py       the files it writes (report.py, charts.py: the page)
terminal.py     the lines it prints
"""
