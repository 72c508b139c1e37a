"""The engine's metrics on Triton's own /metrics: every sample of their text form, with the model's labels.

Triton gives the Python backend counters and gauges, so that a histogram's buckets, sum and count are each a counter;
Prometheus reads them as the histogram they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)
SAMPLE = re.compile(r"([a-z0-9_]+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')


def samples(text: str) -> Iterator[tuple[str, str, str, dict[str, str], float]]:
    """(name, kind, help, labels, value) of each sample in Prometheus' text form."""
    kinds: dict[str, str] = {}
    helps: dict[str, str] = {}
    family = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, family, words = line.split(" ", 3)
            helps[family] = words
        elif line.startswith("# TYPE "):
            kinds[family] = line.rsplit(" ", 1)[1]
        elif found := SAMPLE.fullmatch(line):
            name, labels, value = found.groups()
            yield name, kinds[family], helps[family], dict(LABEL.findall(labels or "")), float(value)


class TritonMetrics:
    """`labels`: of every sample."""

    def __init__(self, pb_utils: Any, labels: dict[str, str]) -> None:
        self.pb, self.labels = pb_utils, labels
        self.families: dict[str, Any] = {}
        self.metrics: dict[tuple[str, str], Any] = {}
        self.values: dict[tuple[str, str], float] = {}
        self.off = False  # the server has no metrics

    def show(self, text: str) -> None:
        """Take over what has changed."""
        if self.off:
            return
        for name, kind, words, labels, value in samples(text):
            key = (name, str(labels))
            if key not in self.metrics:
                try:
                    self.metrics[key] = self._new(name, kind, words, labels)
                except self.pb.TritonModelException as e:
                    log.info("no metrics: %s", e)
                    self.off = True
                    return
            before = self.values.get(key, 0.0)
            if value == before:
                continue
            if kind == "gauge":
                self.metrics[key].set(value)
            else:
                self.metrics[key].increment(value - before)
            self.values[key] = value

    def _new(self, name: str, kind: str, words: str, labels: dict[str, str]) -> Any:
        if name not in self.families:
            of = self.pb.MetricFamily
            self.families[name] = of(name=name, description=words, kind=of.GAUGE if kind == "gauge" else of.COUNTER)
        return self.families[name].Metric(labels={**self.labels, **labels})

    def close(self) -> None:
        """Metrics before their families, while the server still answers."""
        self.metrics.clear()
        self.families.clear()
