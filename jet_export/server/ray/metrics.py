"""The metrics of all replicas at one place: an actor that they report to, and their texts as one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

STALE = 10.0  # seconds without a report: the replica is gone
SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$")


class Board:
    """An actor. The last report of each replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.reports: dict[str, tuple[float, str]] = {}

    def put(self, replica: str, text: str) -> None:
        self.reports[replica] = (self.clock(), text)

    def read(self) -> dict[str, str]:
        """Of the replicas that still report."""
        now = self.clock()
        self.reports = {name: r for name, r in self.reports.items() if now - r[0] <= STALE}
        return {name: text for name, (_, text) in self.reports.items()}


def merged(texts: Mapping[str, str]) -> str:
    """Prometheus texts as one, each sample with the label `replica`; a metric's samples stand together."""
    about: dict[str, list[str]] = {}  # metric -> its HELP and TYPE
    samples: dict[str, list[str]] = {}
    for replica, text in sorted(texts.items()):
        metric = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                metric = line.split(" ", 3)[2]
                about.setdefault(metric, [])
                samples.setdefault(metric, [])
            if line.startswith("#"):
                if line not in about[metric]:
                    about[metric].append(line)
            elif found := SAMPLE.match(line):
                name, labels, value = found.groups()
                inner = ",".join(x for x in (labels, f'replica="{replica}"') if x)
                samples[metric].append(f"{name}{{{inner}}} {value}")
    return "".join("\n".join([*about[m], *samples[m]]) + "\n" for m in about)
