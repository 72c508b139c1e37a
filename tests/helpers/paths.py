"""Folders of the checkout that the tests belong to."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
BENCHMARKS, DOCS, EXAMPLES = (ROOT / name for name in ("benchmarks", "docs", "examples"))
