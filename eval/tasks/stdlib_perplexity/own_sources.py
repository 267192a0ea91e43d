"""Documents of this package's own source files, which no model has read. Nothing is downloaded.

A model may know the standard library by heart; these texts show what a pattern loses on new ones.
They change with the package, so a digest of them is part of the task's version.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from datasets import DatasetDict

import sa_patch

ROOMS = ("patterns", "kernels", "patching", "evaluation")


def sources() -> list[str]:
    """The text of every module of `ROOMS`, in the order of their paths."""
    package = Path(sa_patch.__file__).parent
    return [
        path.read_text(encoding="utf-8")
        for room in ROOMS
        for path in sorted((package / room).rglob("*.py"))
    ]


def windows(window_tokens: int, **_: Any) -> DatasetDict:
    """Documents of at least `window_tokens` tokens: whole modules joined until they are enough."""
    return _stdlib_sources().joined(sources(), window_tokens)


def _stdlib_sources() -> Any:
    # lm-eval loads this file by its path, so that its neighbours are no modules for it.
    path = Path(__file__).with_name("stdlib_sources.py")
    spec = importlib.util.spec_from_file_location("sa_patch_stdlib_sources", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TASK_VERSION = "1.0+" + hashlib.sha256("".join(sources()).encode()).hexdigest()[:12]
