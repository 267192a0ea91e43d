"""Visited keys that were counted after a run, by `scripts/count_visited`; they replace its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError

FILE = "visited.json"
# Prompts are this close to the length that they are named after.
_NEAR = 0.1


class CountedLater:
    """The counts beside a run folder's cells; none where there is no such file.

    Raises:
        UserError: if the file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._counts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        path = folder / FILE
        if not path.is_file():
            return
        try:
            for one in json.loads(path.read_text(encoding="utf-8"))["counts"]:
                if not one["n"] > 0:
                    raise ValueError(f"n is {one['n']}")
                self._counts.setdefault((one["pattern"], one["layers"]), []).append(one)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error!r}); make it anew with scripts/count_visited"
            ) from error

    def find(self, pattern: str, layers: Any, tokens: float | None) -> Mapping[str, Any]:
        """What was counted for prompts of about so many tokens; empty if nothing was."""
        for one in self._counts.get((pattern, layers_text(layers)), []):
            if tokens is not None and abs(tokens / one["n"] - 1) <= _NEAR:
                return one
        return {}


def layers_text(layers: Any) -> str:
    """The layers of a cell's setting, as a key."""
    return json.dumps(layers, sort_keys=True)
