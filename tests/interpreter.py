"""Triton's interpreter without the preparations that it repeats, which were half of its time.

A launch puts interpreted functions in the place of those of `triton.language`. As of Triton 3.9 the
interpreter does so again at every call of a device function, thousands of times in a launch, by
going through all members of the language, and finds each replaced already. Here every launch does
it once for each language module. Also, the table of numpy's types is not built anew for every
tensor. What kernels compute is not touched: tests/kernels/triton/test_interpreter.py compares bits.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAMES = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "GridExecutor", "tl")


def prepare_once_per_launch() -> bool:
    """Whether it could be arranged: not without Triton, or where its interpreter is another."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in NAMES):
        return False
    _replace_once_per_launch(interpreter)
    _remember_types(interpreter)
    return True


def _replace_once_per_launch(interpreter: Any) -> None:
    replace: Callable[[Any], Any] = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    languages = (interpreter.tl, interpreter.tl.core)
    replaced: set[tuple[bool, ...]] = set()

    @functools.cache
    def reached(function: Any) -> tuple[bool, ...]:
        """Which of the language modules the function's own module names."""
        modules = [x for x in function.__globals__.values() if isinstance(x, ModuleType)]
        return tuple(any(module is language for module in modules) for language in languages)

    @functools.wraps(replace)
    def replace_once(function: Any) -> Any:
        found = reached(function)
        if found in replaced:
            return interpreter._LangPatchScope()
        replaced.add(found)
        return replace(function)

    @functools.wraps(launch)
    def launch_anew(*args: Any, **kwargs: Any) -> Any:
        # The launch before put the language back when it ended.
        replaced.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_anew


def _remember_types(interpreter: Any) -> None:
    numpy_type: Callable[[Any], Any] = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    @functools.wraps(numpy_type)
    def remembered(triton_type: Any) -> Any:
        # Types of blocks have no hash, but equal ones have one name.
        name = triton_type.name
        if name not in known:
            known[name] = numpy_type(triton_type)
        return known[name]

    interpreter._get_np_dtype = remembered
