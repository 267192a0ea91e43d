"""Packages that lm-eval's tasks import, and which of our extras bring them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from sa_patch.errors import UserError

# By the folder of lm-eval's tasks. InfiniteBench would score summaries otherwise, and not say so.
NEEDED = {
    "ruler": (("wonderwords", "nltk"), "ruler"),
    "longbench": (("jieba", "fuzzywuzzy", "rouge"), "longbench"),
    "infinitebench": (("rouge_score",), "longbench"),
}
_FOLDER = re.compile(r".*[/\\]lm_eval[/\\]tasks[/\\]([^/\\]+)[/\\]")


def require_packages(name: str, config: Mapping[str, Any]) -> None:
    """Raise a UserError if a package is missing.

    Args:
        config: the task's, its functions not resolved but named by their files.
    """
    for function in (config.get("process_results"), config.get("custom_dataset")):
        found = _FOLDER.match(str(function or ""))
        packages, extra = NEEDED.get(found[1], ((), "")) if found else ((), "")
        missing = [package for package in packages if not importlib.util.find_spec(package)]
        if missing:
            raise UserError(
                f"task {name!r} needs {' and '.join(missing)}; install what it needs with "
                f"`pip install 'sa_patch[{extra}]'`, or leave the task out"
            )
