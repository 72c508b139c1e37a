"""The engine's metrics on Triton's own /metrics endpoint: every sample, with labels of the model.

Triton's Python backend has only counters and gauges, so the buckets, sum and count of a histogram are counters here;
Prometheus still reads them as a histogram.
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
    """(name, kind, help, labels, value) of each sample in Prometheus' text format."""
    kinds: dict[str, str] = {}
    helps: dict[str, str] = {}
    family = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, family, description = line.split(" ", 3)
            helps[family] = description
        elif line.startswith("# TYPE "):
            kinds[family] = line.rsplit(" ", 1)[1]
        elif found := SAMPLE.fullmatch(line):
            name, labels, value = found.groups()
            yield name, kinds[family], helps[family], dict(LABEL.findall(labels or "")), float(value)


class TritonMetrics:
    """`labels` are added to every sample."""

    def __init__(self, pb_utils: Any, labels: dict[str, str]) -> None:
        self.pb, self.labels = pb_utils, labels
        self.families: dict[str, Any] = {}
        self.metrics: dict[tuple[str, str], Any] = {}
        self.values: dict[tuple[str, str], float] = {}
        self.disabled = False  # the server has no metrics

    def update(self, text: str) -> None:
        """Copy the samples that have changed."""
        if self.disabled:
            return
        for name, kind, description, labels, value in samples(text):
            key = (name, str(labels))
            if key not in self.metrics:
                try:
                    self.metrics[key] = self._new(name, kind, description, labels)
                except self.pb.TritonModelException as e:
                    log.info("no metrics: %s", e)
                    self.disabled = True
                    return
            before = self.values.get(key, 0.0)
            if value == before:
                continue
            if kind == "gauge":
                self.metrics[key].set(value)
            else:
                self.metrics[key].increment(value - before)
            self.values[key] = value

    def _new(self, name: str, kind: str, description: str, labels: dict[str, str]) -> Any:
        if name not in self.families:
            family = self.pb.MetricFamily
            kind = family.GAUGE if kind == "gauge" else family.COUNTER
            self.families[name] = family(name=name, description=description, kind=kind)
        return self.families[name].Metric(labels={**self.labels, **labels})

    def close(self) -> None:
        """Release metrics before their families, while the server still responds."""
        self.metrics.clear()
        self.families.clear()
