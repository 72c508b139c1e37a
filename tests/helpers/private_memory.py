"""Private memory of a process: pages of mapped files, which the system may drop, are not in it."""

import re
import threading
from pathlib import Path


def private_bytes(pid: int | str = "self") -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


class PeakGrowth:
    """By how many bytes the private memory of this process grew at most while a `with` block ran."""

    def __enter__(self) -> "PeakGrowth":
        self.before = self.peak = private_bytes()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, private_bytes())

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self.peak = max(self.peak, private_bytes())

    @property
    def grown(self) -> int:
        return self.peak - self.before
