"""The measured steps that `inspect --tpot-ms` predicts from, as data of the package: of each bench.json the environment
and the times.

    python benchmarks/tools/step_tables.py      # benchmarks/results/*/*/bench.json -> jet_export/data/measured/
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, TABLES = ROOT / "benchmarks" / "results", ROOT / "jet_export" / "data" / "measured"
KEPT = ("model", "manifest_sha256", "rows", "prompt_calls")


def tables() -> dict[Path, str]:
    """What the package should hold: file -> text."""
    out = {}
    for file in sorted(RESULTS.glob("*/*/bench.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        bundles: list[dict[str, Any]] = [{k: b[k] for k in KEPT if k in b} for b in result["bundles"] if b["rows"]]
        if bundles:
            table = {"environment": result["environment"], "bundles": bundles}
            name = TABLES / file.parts[-3] / f"{file.parent.name}.json"
            out[name] = json.dumps(table, separators=(",", ":")) + "\n"
    return out


def main() -> None:
    wanted = tables()
    for old in set(TABLES.rglob("*.json")) - set(wanted):
        old.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
