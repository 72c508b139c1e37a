"""Triton's interpreter without repetitions that are more than half of its time.

A launch patches triton.language, and so does every call of a device function within it, hundreds of attributes each
time, although all but the first from a module find them patched; and every operation makes a table of numpy's dtypes.
"""

import functools
from typing import Any


def patch_interpreter() -> None:
    from triton.runtime import interpreter

    patch_lang, patched = interpreter._patch_lang, set[int]()
    launch = interpreter.GridExecutor.__call__
    np_dtype = interpreter._get_np_dtype
    np_dtype_once = functools.cache(np_dtype)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_first(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch_lang(function)

    def np_dtype_of(dtype: Any) -> Any:
        scalar = dtype.scalar
        return np_dtype(scalar) if scalar.is_ptr() else np_dtype_once(scalar)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_afresh, patch_first
    interpreter._get_np_dtype = np_dtype_of
