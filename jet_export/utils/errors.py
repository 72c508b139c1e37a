"""The exception for bad input: what is wrong, where, and what to do. The CLI prints it and exits with status 2."""


class JetExportError(Exception):
    """Bad input or a missing requirement. `str(e)` is the whole message, ready to print."""

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(f"{what}\n{todo}" if todo else what)


def shown(value: object, most: int = 80) -> str:
    """A value in a message: its repr, cut to so many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


class JetExportWarning(UserWarning):
    """Something that the user should know of and that does not stop the work; the CLI prints it in one line."""


GPU_MEMORY = (
    "Other processes hold it (nvidia-smi lists them), or the bundle's limits, the batch or the context need more than "
    "there is: jet-export inspect says how much."
)


def out_of_gpu_memory(text: str) -> str | None:
    """The sentences of `text` in which torch or CUDA says that a GPU's memory ran out; None where none does."""
    for line in text.splitlines():
        for mark in ("CUDA out of memory. ", "CUDA error: out of memory", "OutOfMemoryError: "):
            if mark in line:
                return ". ".join(line[line.index(mark) :].split(". ")[:3]).rstrip(". ") + "."
    return None
