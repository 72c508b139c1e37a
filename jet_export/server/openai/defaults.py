"""Sampling defaults of a bundle's generation_config.json, for fields that a request leaves out."""

from __future__ import annotations

import json
import math
from pathlib import Path

from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.utils.errors import JetExportError

FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def load_sampling_defaults(bundle: str | Path) -> dict[str, float]:
    """By field; empty without such a file. Raises JetExportError for values that no request could have."""
    path = Path(bundle) / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {name: config[name] for name in FIELDS if config.get(name) is not None}
    try:
        for name, value in found.items():
            whole = name != "top_k" or isinstance(value, int)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not whole:
                raise JetExportError(f"{name} {value!r} is not a number.")
        sampling = {name: value for name, value in found.items() if name != "repetition_penalty"}
        Params(sampling=Sampling(**sampling), repetition_penalty=found.get("repetition_penalty", 1.0))
    except JetExportError as e:
        raise JetExportError(f"{path}: {e}", "Correct it, or serve with --generation-config none.") from None
    return found
