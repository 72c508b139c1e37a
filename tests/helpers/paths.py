"""Folders of the checkout that the tests belong to."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
BENCHMARKS, DOCS, EXAMPLES = (ROOT / name for name in ("benchmarks", "docs", "examples"))


def with_helpers(**variables: str) -> dict[str, str]:
    """The environment of a process that imports `helpers`."""
    return {**os.environ, "PYTHONPATH": str(TESTS), **variables}
