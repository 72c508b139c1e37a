"""A kernel in one configuration, and what it became for one SM: the rows of the generated table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jet_export.plugins.symbolic import Launch


@dataclass(frozen=True)
class Image:
    """A kernel compiled for one SM."""

    sm: int
    shared: int
    threads: int
    clusters: int
    fewer_stages: int  # than the launcher asks for
    cubin: bytes


@dataclass(frozen=True)
class Kernel:
    """What the table holds of one kernel in one configuration."""

    name: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    def text(self) -> str:
        constants = [f"{name}={value}" for name, value in (*self.constexprs, *self.options)]
        return f"{self.name}({', '.join(constants)})"


def kernel_of(launch: Launch) -> Kernel:
    return Kernel(
        launch.kernel.__name__, tuple(launch.signature.items()), tuple(launch.constexprs.items()), launch.divisible,
        tuple(launch.options.items()),
    )  # fmt: skip
