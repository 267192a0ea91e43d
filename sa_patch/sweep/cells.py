"""Cells of a sweep: what identifies one, and how its file is written and trusted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_patch.files.packed import stored_text

if TYPE_CHECKING:
    # Reading a run must not load torch.
    from sa_patch.patterns import Pattern

SCHEMA = 1
# Settings of a task that are part of a cell's identity only where they are given.
PROMPT_SETTINGS = (
    "metadata",
    "apply_chat_template",
    "system_instruction",
    "fewshot_as_multiturn",
    "truncation",
    "max_prompt_tokens",
)


def cell_id(cell: Mapping[str, Any]) -> str:
    """Sixteen hex digits that stand for everything that determines a cell's result."""
    canonical = json.dumps(cell, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def pattern_fields(pattern: Pattern) -> dict[str, Any]:
    """The part of a cell's identity that a pattern gives; a union's seed is its random parts'."""
    from sa_patch.patterns import seed_of

    return {
        "pattern": str(pattern),
        "method": pattern.name,
        "window": pattern.effective_window,
        "seed": seed_of(pattern),
    }


@dataclass(frozen=True)
class Found:
    """What lies where a cell's file should be.

    ``data`` is the file's content if it can be trusted as this cell's finished result, else None;
    then ``reason`` says why it is done (again), and is None where there is no file at all.
    """

    data: Mapping[str, Any] | None
    reason: str | None = None


def read_cell(path: Path, expected: Mapping[str, Any]) -> Found:
    """Read the file of the cell `expected`, trusting nothing that it does not prove."""
    try:
        text = stored_text(path)
    except FileNotFoundError:
        return Found(None)
    except (OSError, UnicodeDecodeError) as error:
        return Found(None, f"cannot be read ({error})")
    try:
        data = json.loads(text)
    except ValueError:
        return Found(None, "is torn: not a complete JSON file")
    reason = _distrust(data, expected)
    return Found(None, reason) if reason else Found(data)


def _distrust(data: Any, expected: Mapping[str, Any]) -> str | None:
    if not isinstance(data, dict) or not isinstance(data.get("cell"), dict):
        return "is not a cell file of sa-patch"
    if data.get("schema") != SCHEMA:
        return f"has schema {data.get('schema')!r}, this version writes {SCHEMA}"
    if data["cell"] != dict(expected) or data.get("id") != cell_id(expected):
        return "describes another cell than its name says"
    if data.get("status") == "failed":
        return f"failed before: {data.get('error')}"
    primary = data.get("primary")
    if data.get("status") != "done" or not isinstance(primary, dict):
        return "holds no finished result"
    value = primary.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "holds no finite primary score"
    if not isinstance(data.get("scores"), dict) or not isinstance(data.get("measured"), dict):
        return "lacks its scores or its measurements"
    return None
