"""The texts that models are trained on, one document at a time."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.files.packaged import tasks_dir
from sa_patch.training.pretraining.settings import TextSettings

# Tests repeat what they test, and most of the standard library's bytes are theirs.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTATION = ("*.dist-info/METADATA", "**/*.md", "**/*.rst")
# Of a dataset without a validation split, each one of so many documents is held out.
_HELD_OUT_ONE_IN = 100


def documents(settings: TextSettings, held_out: bool) -> Iterator[str]:
    """The training or the held-out documents, in an order that is always the same.

    Raises:
        UserError: if the source cannot be read.
    """
    if settings.source == "installed":
        return _installed(held_out)
    return _dataset(settings, held_out)


def _installed(held_out: bool) -> Iterator[str]:
    """Python's own sources, then the documents of installed packages.

    Held out are the modules that our lm-eval tasks read, so that these measure what was not seen.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    tested = {f"{name}.py" for name in _tested_modules()}
    sources = [
        path
        for path in sorted(stdlib.rglob("*.py"))
        if not _SKIPPED & set(path.relative_to(stdlib).parts)
    ]
    if held_out:
        chosen = [path for path in sources if str(path.relative_to(stdlib)) in tested]
    else:
        packages = Path(sysconfig.get_path("purelib"))
        prose = {path for kind in _DOCUMENTATION for path in packages.glob(kind)}
        chosen = [path for path in sources if str(path.relative_to(stdlib)) not in tested]
        chosen += sorted(prose)
    if not chosen:
        raise UserError(
            f"{stdlib} holds no sources of the standard library; use a Python that is installed "
            "with its sources, or another text source"
        )
    for path in chosen:
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield text


def _tested_modules() -> list[str]:
    path = tasks_dir() / "stdlib_perplexity" / "stdlib_sources.py"
    spec = importlib.util.spec_from_file_location("sa_patch_stdlib_sources", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be read; install sa_patch again")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.MODULES)


def _dataset(settings: TextSettings, held_out: bool) -> Iterator[str]:
    import datasets

    own_split = settings.validation_split
    split = own_split if held_out and own_split else settings.split
    files = list(settings.data_files) or None
    try:
        rows = datasets.load_dataset(
            settings.source, settings.subset, data_files=files, split=split, streaming=True
        )
    except Exception as error:  # datasets raises its own, the hub's and the file system's errors
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the text source {settings.source!r} cannot be loaded: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    for index, row in enumerate(rows):
        if settings.column not in row:
            raise UserError(
                f"the text source {settings.source!r} has no column {settings.column!r}; "
                f"it has {', '.join(row)}"
            )
        if own_split or (index % _HELD_OUT_ONE_IN == 0) == held_out:
            yield row[settings.column]
