"""Where a program of the CUDA toolkit is."""

import os
import shutil
from pathlib import Path


def find(name: str, named: str | None = None) -> str | None:
    """The path of `name`: `named` where that is a file, else on the PATH, in $CUDA_HOME or in /usr/local/cuda."""
    homes = [h for h in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if h]
    places = [named, shutil.which(name), *(f"{h}/{sub}/{name}" for h in homes for sub in ("bin", name))]
    return next((p for p in places if p and Path(p).is_file()), None)
