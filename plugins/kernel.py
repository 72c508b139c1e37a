"""A kernel in one configuration, and its images for the SMs: the rows of the generated table."""

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
    """A kernel in one configuration: a row of the generated table."""

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
        launch.kernel.__name__,
        tuple(launch.signature.items()),
        tuple(launch.constexprs.items()),
        launch.divisible,
        tuple(launch.options.items()),
    )
