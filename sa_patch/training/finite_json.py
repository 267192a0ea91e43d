"""Results as JSON: trainings may diverge, and JSON has no NaN and no infinity."""

from __future__ import annotations

import json
from typing import Any

from sa_patch.analysis.reports.report import as_json

# Significant digits that tell any two float64 apart.
_ALL_DIGITS = 17


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text in which null stands for what is no finite number."""
    return json.dumps(as_json(value, _ALL_DIGITS), indent=indent, allow_nan=False)


def from_json(text: str) -> Any:
    """What JSON text holds; None for NaN and infinities too, which older files have.

    Raises:
        ValueError: if it is no JSON.
    """
    return json.loads(text, parse_constant=lambda _: None)
