"""Scripts of benchmarks/ as modules, for tests of what is in them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from helpers.paths import BENCHMARKS


def load_script(path: str) -> ModuleType:
    """`benchmarks/PATH`, imported as running it would: its own folder comes first on the path."""
    return load_file(BENCHMARKS / path)


def load_file(script: Path) -> ModuleType:
    if str(script.parent) not in sys.path:
        sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location(f"{script.stem}_script", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
