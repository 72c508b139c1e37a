"""The GPU architectures a plugin library can hold kernels for, and how `--sm` names them."""

from __future__ import annotations

from jet_export.utils.errors import JetExportError

# Shared memory a block may have, bytes: CUDA programming guide, technical specifications per compute capability.
SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
FIRST_FP8 = 89


def sm_name(sm: int) -> str:
    """90 -> "9.0"."""
    return f"{sm // 10}.{sm % 10}"


def known_sms() -> str:
    return ", ".join(sm_name(sm) for sm in SHARED)


def parse_sms(text: str) -> tuple[int, ...]:
    """ "8.0,8.9,9.0" -> (80, 89, 90), sorted, each once. Raises JetExportError for a malformed or unknown SM."""
    found = set()
    for part in text.split(","):
        major, dot, minor = part.strip().partition(".")
        if not (dot and major.isdecimal() and minor.isdecimal() and len(minor) == 1):
            raise JetExportError(
                f"--sm {text}: {part.strip()!r} is no compute capability.", "Write them like --sm 8.9,9.0"
            )
        sm = 10 * int(major) + int(minor)
        if sm not in SHARED:
            raise JetExportError(f"--sm {text}: SM {sm_name(sm)} is not known here.", f"Known: {known_sms()}.")
        found.add(sm)
    return tuple(sorted(found))


def sm_of_arch(arch: str) -> int | None:
    """ "sm_90" -> 90; None for a CPU's."""
    digits = arch.removeprefix("sm_")
    return int(digits) if arch != digits and digits.isdecimal() else None


def check_fp8(sms: tuple[int, ...], what: str) -> None:
    """Raises JetExportError if an SM has no FP8 arithmetic. `what`: the option that asks for it."""
    lacking = [sm_name(sm) for sm in sms if sm < FIRST_FP8]
    if lacking:
        raise JetExportError(
            f"{what}: SM {', '.join(lacking)} has no FP8 arithmetic, which needs 8.9 or newer.",
            f"Leave {'it' if len(lacking) == 1 else 'them'} out of --sm, or build in bf16.",
        )
