"""Sampling defaults of a bundle's generation_config.json, for fields that a request leaves out."""

from __future__ import annotations

import math
from pathlib import Path

from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.utils.errors import JetExportError, shown
from jet_export.utils.schema import read_json_object

FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def load_sampling_defaults(bundle: str | Path) -> dict[str, float]:
    """By field; empty without such a file. Raises JetExportError for values that no request could have."""
    path = Path(bundle) / "generation_config.json"
    config = read_json_object(path)
    found = {name: config[name] for name in FIELDS if config.get(name) is not None}
    try:
        for name, value in found.items():
            whole = name != "top_k" or isinstance(value, int)
            number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
            if not number or not whole:  # abs: of integers that no float holds, too
                raise JetExportError(f"{name} {shown(value)} is not a number.")
        sampling = {name: value for name, value in found.items() if name != "repetition_penalty"}
        Params(sampling=Sampling(**sampling), repetition_penalty=found.get("repetition_penalty", 1.0))
    except JetExportError as e:
        raise JetExportError(f"{path}: {e}", "Correct it, or serve with --generation-config none.") from None
    return found
