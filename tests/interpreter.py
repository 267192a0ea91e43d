"""Triton's interpreter without the preparations that it repeats, which were half of its time.

A launch puts interpreted functions in the place of those of `triton.language`. As of Triton 3.9 the
interpreter does so again at every call of a device function, thousands of times in a launch, by
going through all members of the language, and finds each replaced already. Here every launch does
it once for each language module. Also, the table of numpy's types is not built anew for every
tensor, nor the shape of every tensor and its type from objects for each size; blocks of one shape
are not made one shape; and sums and products of integers are not computed a second time, in 64
bits, to look for an overflow that only a debugging run would report. What kernels compute is not
touched: tests/kernels/triton/test_interpreter.py compares bits.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAMES = (
    *("_patch_lang", "_LangPatchScope", "_patch_attr", "_get_np_dtype", "GridExecutor", "tl"),
    *("interpreter_builder", "interpreter_semantic"),
)


def prepare_once_per_launch() -> bool:
    """Whether it could be arranged: not without Triton, or where its interpreter is another."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in NAMES):
        return False
    _replace_once_per_launch(interpreter)
    _call_directly(interpreter)
    _remember_types(interpreter)
    _remember_shapes(interpreter.tl.core)
    _leave_equal_shapes(type(interpreter.interpreter_semantic))
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(
        options, sanitize_overflow=options.debug
    )
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


def _call_directly(interpreter: Any) -> None:
    replace = interpreter._patch_attr
    # Functions of the language share this one, which only asks whether they were told `_semantic`.
    asking = interpreter.tl.core.builtin(lambda: None).__code__

    @functools.wraps(replace)
    def replace_directly(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        semantic = interpreter.interpreter_semantic
        function = member.__wrapped__ if member.__code__ is asking else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = replace_directly


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


def _remember_shapes(core: Any) -> None:
    set_up_tensor, set_up_type = core.tensor.__init__, core.block_type.__init__
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    of_types: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    @functools.wraps(set_up_tensor)
    def tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in of_tensors:
            set_up_tensor(self, handle, type)
            of_tensors[sizes] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[sizes]

    @functools.wraps(set_up_type)
    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([x.value if type(x) is core.constexpr else x for x in shape])
        key = (element_ty.name, sizes)
        if key not in of_types:
            set_up_type(self, element_ty, shape)
            of_types[key] = {name: getattr(self, name) for name in ("shape", "numel", "name")}
        self.__dict__.update(of_types[key], element_ty=element_ty)

    core.tensor.__init__, core.block_type.__init__ = tensor, block_type


def _leave_equal_shapes(semantic: Any) -> None:
    broadcast = semantic.broadcast_impl_value

    @functools.wraps(broadcast)
    def unless_equal(self: Any, one: Any, other: Any) -> Any:
        if one.type.is_block() and other.type.is_block():
            if one.type.shape.values == other.type.shape.values:
                return one, other
        elif not (one.type.is_block() or other.type.is_block()):
            return one, other
        return broadcast(self, one, other)

    semantic.broadcast_impl_value = unless_equal
