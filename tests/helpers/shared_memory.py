"""A /dev/shm that is full, for one command: a tmpfs of a page in a mount namespace of its own."""

import subprocess

import pytest

FULL = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero >/dev/shm/full && exec "$@"'


def in_full_shm(*command: str) -> list[str]:
    """The command that runs `command` so. Skips the test where no namespace can be made."""
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c", FULL, "sh"]
    try:
        subprocess.run([*inside, "true"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"no mount namespace here: {getattr(e, 'stderr', None) or e}")
    return [*inside, *command]
