"""Every way in which writing can end: an action is run again and again in a child, which is killed, or whose disk is
full, at its first change of a file, then at its second, and so on until it comes through. A line that it says counts as
a change, where the test passes it to `say`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.symlink")
THROUGH, FAILED, BROKEN = 0, 3, 4  # exit statuses of the child


def say(line: str, **_: object) -> None:
    """In place of what prints the lines of stages."""
    sys.audit("tests.said", line)


def _writes(event: str, args: tuple[object, ...]) -> bool:
    if event == "open":
        path, _, flags = args
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and path != os.devnull
    return event in CHANGES or event == "tests.said"


def _run(
    action: Callable[[], object],
    number: int,
    fault: Callable[[], None],
    expected: tuple[type[Exception], ...],
    always: bool = False,
) -> None:
    """In the child: the action, with `fault` at its change of this number (`always`: at later ones, too). Does not
    return."""
    left = [number]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if _writes(event, args):
            left[0] -= 1
            if left[0] == 0 or (always and left[0] < 0):
                fault()

    status = BROKEN
    try:
        sys.addaudithook(hook)
        action()
        status = THROUGH
    except expected:
        status = FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _ends(
    action: Callable[[], object], fault: Callable[[], None], expected: tuple[type[Exception], ...] = ()
) -> Iterator[int]:
    """The number of each change at which the fault ended the action."""
    for number in range(1, 1000):
        if (child := os.fork()) == 0:
            _run(action, number, fault, expected)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == THROUGH:
            return
        assert status in (-signal.SIGKILL, FAILED), f"change {number}: ended with {status}"
        yield number
    raise AssertionError("it never comes through")


def killed_at_every_change(action: Callable[[], object]) -> Iterator[int]:
    """After each SIGKILL, its number; ends once the action has come through."""
    return _ends(action, lambda: os.kill(os.getpid(), signal.SIGKILL))


def full_at_every_change(action: Callable[[], object], *expected: type[Exception]) -> Iterator[int]:
    """The same with a disk that is full for one change: the action raises one of `expected`, or gets by without."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")

    return _ends(action, full, expected)


def read_only(action: Callable[[], object], *expected: type[Exception]) -> None:
    """The action in a child that can change no file. Fails unless it raises one of `expected`."""

    def refuse() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "there")

    if (child := os.fork()) == 0:
        _run(action, 1, refuse, expected, always=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == FAILED, f"ended with {status}"


def files(directory: Path) -> dict[str, bytes]:
    """What lies under a directory, by name."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
