"""The exception for bad input: what is wrong, where, and what to do. The CLI prints it and exits with status 2."""

import errno
import os

BAD_INPUT = 2  # exit status: again would fail again
ENGINE_LOST = 70  # exit status of a server that a supervisor should start again (EX_SOFTWARE of sysexits.h)
IO_FAILED = 74  # exit status: a file could not be written or read (EX_IOERR); what was there before is whole


class JetExportError(Exception):
    """Bad input or a missing requirement. `str(e)` is the whole message, ready to print."""

    status = BAD_INPUT

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(f"{what}\n{todo}" if todo else what)


class EngineLost(JetExportError):
    """A server's engine has ended or hangs; another process may well run."""

    status = ENGINE_LOST


def shown(value: object, most: int = 80) -> str:
    """A value in a message: its repr, cut to so many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


class JetExportWarning(UserWarning):
    """Something that the user should know of and that does not stop the work; the CLI prints it in one line."""


IO_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.ENAMETOOLONG)
DISK = "Free space there, or name another place; nothing half-written is left under the name that you gave."
GPU_MEMORY = (
    "Other processes hold it (nvidia-smi lists them), or the bundle's limits, the batch or the context need more than "
    "there is: jet-export inspect says how much."
)


def io_failure(e: BaseException) -> str | None:
    """The sentence of an error that the disk, or its permissions, caused; None of others. Libraries that write files
    raise their own kinds, with the system's text in them."""
    if isinstance(e, OSError) and e.errno in IO_ERRORS:
        return f"{e.filename or 'a file'}: {e.strerror}."
    text = str(e)
    return next((f"{text.splitlines()[0][:300]}." for n in IO_ERRORS if os.strerror(n) in text), None)


def device_lost(e: BaseException | None) -> bool:
    """Whether this is CUDA's word that the device, or its context, is of no more use: all later calls fail too."""
    text = f"{type(e).__name__}: {e}"
    return ("CUDA error" in text or "AcceleratorError" in text) and out_of_gpu_memory(text) is None


def out_of_gpu_memory(text: str) -> str | None:
    """The sentences of `text` in which torch or CUDA says that a GPU's memory ran out; None where none does."""
    for line in text.splitlines():
        for mark in ("CUDA out of memory. ", "CUDA error: out of memory", "OutOfMemoryError: "):
            if mark in line:
                return ". ".join(line[line.index(mark) :].split(". ")[:3]).rstrip(". ") + "."
    return None
