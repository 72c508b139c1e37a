"""What the fuzz tests share: how long they look, and values with something wrong in them.

In CI they are bounded and repeat themselves; `make fuzz` looks longer, at other values each time. What it finds is
added to its test as an `@example`.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("JET_FUZZ", "1"))  # times as many examples as CI looks at
DEEP = [[[[[[[[{"a": [1]}]]]]]]]]
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 0.5, -0.5, 2**31, -(2**63), 2**70, 1e308, math.nan, math.inf, "", "x", "\x00", "/",
    "../..", "~nobody/x", "**x", "[/b]", "{}", "\ud800", "é" * 300, [], [[]], [None], {}, {"": None}, DEEP, [0] * 99,
]  # fmt: skip
Path = tuple[str | int, ...]


def fuzz(examples: int) -> settings:
    """Decorator: so many examples in CI."""
    return settings(
        max_examples=examples * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=FACTOR > 1,
    )


def paths(values: Any, path: Path = ()) -> Iterator[Path]:
    """Of every value in a JSON value, itself included."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def changed(values: Any, path: Path, value: Any) -> Any:
    """A copy with this value there."""
    if not path:
        return value
    out = copy.deepcopy(values)
    place = out
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return out


def without(values: Any, path: Path) -> Any:
    out = copy.deepcopy(values)
    place = out
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return out


@st.composite
def mutated(draw: st.DrawFn, values: Any, most: int = 2, root: bool = True) -> Any:
    """`values` (`root`: they may be replaced as a whole) with up to so many values replaced, left out or added."""
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from([p for p in paths(values) if p or root] or [()]))
        how = draw(st.sampled_from(("replace", "replace", "replace", "leave out", "add")))
        hostile = draw(st.sampled_from(HOSTILE))
        if how == "leave out" and path:
            values = without(values, path)
        elif how == "add":
            objects = [p for p in paths(values) if isinstance(_at(values, p), dict)]
            if objects:
                values = changed(
                    values, (*draw(st.sampled_from(objects)), draw(st.sampled_from(("x", "", "é")))), hostile
                )
        else:
            values = changed(values, path, hostile)
    return values


def _at(values: Any, path: Path) -> Any:
    for key in path:
        values = values[key]
    return values


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` cut short, with bytes changed, or with others in between."""
    how = draw(st.sampled_from(("cut", "change", "insert")))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if how == "cut":
        return data[:at]
    new = draw(
        st.binary(min_size=1, max_size=9) | st.sampled_from([b"[" * 5000, b'"', b"= ", b"9" * 5000, b"\n", b"\xff"])
    )
    return data[:at] + new + data[at + (len(new) if how == "change" else 0) :]


def as_json(values: Any) -> str:
    """JSON, with NaN and infinities where they are, as Python reads them."""
    return json.dumps(values)
