"""Inductor's precompiled C++ headers, 40 s of g++, for processes with a temporary directory of their own."""

from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir


def share_headers(temporary: Path) -> None:
    """A process with TMPDIR=`temporary` finds this process's headers there, and leaves there what it makes."""
    headers = Path(default_cache_dir()) / "precompiled_headers"
    headers.mkdir(parents=True, exist_ok=True)
    place = temporary / headers.parent.name
    place.mkdir()
    (place / headers.name).symlink_to(headers)
