"""`jet-export simulate` held against jet-tiny, served on this CPU: arrivals at half of what the engine can do.

The law: simulated from step times that were measured in the same seconds, the median TTFT and TPOT differ from the
served ones by less than a factor of sqrt(2): they are nearer to the truth than to half or to twice as much. So a
simulator whose steps take twice as long fails. All times are CPU time of this process, idle time between requests is
skipped, steps and requests are measured in turns, and both once more where a neighbour has disturbed them.
"""

import asyncio
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.bundles import tiny_bundle
from helpers.scripts import load_script

from jet_export.backends.base import Engine
from jet_export.backends.load import load_engine
from jet_export.bench import command, protocols, timer
from jet_export.bench.command import BenchOptions, run_bench
from jet_export.bench.predict import joined
from jet_export.bench.protocols import Asked
from jet_export.bench.roofline import Peaks
from jet_export.bench.verified import Verdict
from jet_export.runtime.capacity import Serving
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.simulate.cluster import Cluster, ClusterPlan, Outcome
from jet_export.simulate.engine import PlannedEngine, bundle_engine
from jet_export.simulate.load import Arrival, Lengths, Poisson
from jet_export.simulate.measures import tpot, ttft
from jet_export.simulate.step_times import fit_times

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a table that is made here is a GPU's")
WITHIN = math.sqrt(2)
LOAD = 0.5  # of the requests a second that the simulated engine ends when it always has some
TURNS, REQUESTS = 3, 6
PROMPT, OUTPUT = Lengths(mean=80, sigma=0.3), Lengths(mean=12, sigma=0.3)
ASKED = Asked(protocol="latency", contexts=(64, 128), batches=(1, 2, 4), new_tokens=12)
SERVING = Serving(prefix_cache_bytes=0, host_cache_bytes=0)


def drawn(rate: float, seed: int) -> list[Arrival]:
    return Poisson(rate=rate, requests=REQUESTS, prompt=PROMPT, output=OUTPUT, seed=seed).draw()


def simulated(planned: PlannedEngine, load: list[Arrival], scale: float = 1.0) -> Outcome:
    """`scale`: of all step times."""
    model, _ = planned.model(SERVING)
    times = fit_times(planned.table, planned.config, planned.dtypes, scale=scale).times
    return Cluster(replace(model, times=times), ClusterPlan(replicas=1)).serve(load)


def medians(requests: Sequence[tuple[float, float]]) -> list[float]:
    """Of (TTFT, TPOT) of each."""
    return [statistics.median(values) for values in zip(*requests, strict=True)]


def near(factor: float) -> bool:
    return 1 / WITHIN < factor < WITHIN


@dataclass
class Truth:
    """jet-tiny's bundle."""

    bundle: Path
    engine: Engine
    script: Any  # serve_load.py

    def table(self, directory: Path) -> PlannedEngine:
        run_bench(BenchOptions(bundle=self.bundle, asked=ASKED, output=directory), [], lambda line: None)
        return bundle_engine(self.bundle, directory / "bench.json")

    def served(self, client: Any, load: list[Arrival]) -> list[tuple[float, float]]:
        """(TTFT, TPOT) of each request."""
        rng, vocabulary = random.Random(0), self.engine.config.vocab_size
        prompts = [[rng.randrange(vocabulary) for _ in range(a.prompt)] for a in load]
        requests = [self.script.LoadRequest(p, a.output) for p, a in zip(prompts, load, strict=True)]
        traces = asyncio.run(self.script.send_all(client, requests, [a.at for a in load]))
        assert not any(t.error for t in traces)
        return [(t.ttft, t.tpot) for t in traces]

    def factors(self, directory: Path) -> dict[float, list[float]]:
        """Scale of the step times -> simulated over measured, TTFT and TPOT."""
        planned = self.table(directory / "before")
        rate = LOAD * REQUESTS / simulated(planned, drawn(1e6, 0)).seconds
        loads = [drawn(rate, turn) for turn in range(TURNS)]
        measured = []
        with self.script.InProcess(self.engine, load_tokenizer(self.bundle), SERVING) as client:
            self.served(client, loads[0][:1])  # the first one takes longer
            for turn, load in enumerate(loads):
                measured += self.served(client, load)
                again = self.table(directory / str(turn))
                planned = replace(planned, table=joined(planned.table, again.table))
        out = {}
        for scale in (1.0, 2.0):
            jobs = [job for load in loads for job in simulated(planned, load, scale).jobs]
            found = medians([(ttft(j), tpot(j) or 0.0) for j in jobs])
            out[scale] = [a / b for a, b in zip(found, medians(measured), strict=True)]
        return out


@pytest.fixture
def truth(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Truth:
    bundle = tiny_bundle(tmp_path_factory)
    loaded = load_engine(bundle)
    script = load_script("serving/serve_load.py")
    monkeypatch.setattr(script.CLOCK, "cpu", True)
    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=time.process_time))
    monkeypatch.setattr(protocols, "FIRST_TOKENS", 1)  # fills of a case
    # Verified by other tests; its speeds are compared with nothing.
    monkeypatch.setattr(command, "load_engine", lambda path: loaded)
    monkeypatch.setattr(command, "require_verified", lambda path, emit: Verdict("", True, (), ""))
    speeds = dict.fromkeys((torch.float32, torch.bfloat16, torch.float8_e4m3fn), 1e11)
    monkeypatch.setattr(command, "measure_peaks", lambda device, dtypes: Peaks(1e10, speeds))
    return Truth(bundle, loaded[0], script)


def test_medians_at_half_of_the_capacity_are_those_of_the_server(truth: Truth, tmp_path: Path) -> None:
    for attempt in range(2):
        found = truth.factors(tmp_path / str(attempt))
        if all(map(near, found[1.0])) and not any(map(near, found[2.0])):
            return
    pytest.fail(f"by scale of the steps, TTFT and TPOT simulated over measured: {found}")
