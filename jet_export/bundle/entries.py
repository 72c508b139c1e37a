"""What the objects of a manifest hold: the schema by which `Manifest.load` refuses what no build writes."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from jet_export.utils.schema import Count, Positive, one_of

DTYPES = ("bfloat16", "float16", "float32")
Dtype = Annotated[str, one_of(*DTYPES)]
CacheDtype = Annotated[str, one_of(*DTYPES, "fp8", "float8_e4m3fn")]


def inside(name: str) -> str:
    """A file's path, relative to the bundle and within it. Raises ValueError for any other."""
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise ValueError("which is no path inside the bundle")
    return name


def sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("not 64 hexadecimal digits")
    return text


OPEN = ConfigDict(extra="allow")  # of later versions, and notes: kept
InsidePath = Annotated[str, AfterValidator(inside)]


@with_config(OPEN)
class ModelEntry(TypedDict):
    """Other keys are kept."""

    name: str
    config: dict[str, Any]  # JetNemotronConfig checks it
    source: NotRequired[str]
    licence: NotRequired[str | None]


@with_config(OPEN)
class BackendEntry(TypedDict):
    """And the versions of what it was built with, by name."""

    name: str
    torch: NotRequired[str]
    triton: NotRequired[str]
    dependent_launch: NotRequired[bool]
    library_in_plan: NotRequired[bool]


@with_config(OPEN)
class TargetEntry(TypedDict):
    device: Literal["cpu", "cuda"]
    arch: str
    gpu: NotRequired[str]
    isa: NotRequired[list[str]]
    sms: NotRequired[list[Annotated[int, Field(ge=1, le=999)]]]


@with_config(OPEN)
class QuantizationEntry(TypedDict):
    """`quantization.QuantizationReport`."""

    fp8: dict[str, dict[Literal["weight_scale", "input_scale"], Positive]]
    kept: list[tuple[str, str]]
    kv_scales: dict[str, tuple[Positive, Positive]]
    calibration_tokens: Count


@with_config(OPEN)
class BuildEntry(TypedDict, total=False):
    command: list[str]
    inputs: dict[str, Any]
    date: str
    seconds: float
    verified: dict[str, Any]


@with_config(OPEN)
class FileEntry(TypedDict):
    sha256: Annotated[str, AfterValidator(sha256)]
    bytes: Count
