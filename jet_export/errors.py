"""The one exception for bad input: what is wrong, where, and what to do. The CLI prints it and exits with status 2."""


class JetExportError(Exception):
    """Bad input or a missing requirement. `str(e)` is the whole message, ready to print."""

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(f"{what}\n{todo}" if todo else what)
