"""What stands in a YAML file, checked value by value: one clear sentence for each mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sa_patch.errors import UserError, suggest


def known_mapping(raw: Any, what: str, known: Sequence[str]) -> dict[str, Any]:
    """A mapping that has no keys but `known` ones."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{what} must be a mapping of keys to values, got {raw!r}")
    for key in raw:
        if key not in known:
            near = suggest(str(key), list(known))
            raise UserError(f"unknown key {key!r} in {what}{near} known: {', '.join(known)}")
    return dict(raw)


def any_mapping(raw: Any, what: str) -> dict[str, Any]:
    """A mapping of whatever keys, nothing as an empty one."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise UserError(f"{what} must be a mapping of keys to values, got {raw!r}")
    return dict(raw)


def listed(raw: Any, what: str) -> list[Any]:
    """A list as it is, a single value as a list of one, nothing as an empty list."""
    if raw is None:
        return []
    if isinstance(raw, list):
        return raw
    if isinstance(raw, (str, int, float, Mapping)):
        return [raw]
    raise UserError(f"{what!r} must be a list, got {raw!r}")


def text(value: Any, what: str) -> str:
    """`value` if it is a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} must be a non-empty text, got {value!r}")
    return value


def unique(items: Any) -> tuple[Any, ...]:
    """The items in their order, equal ones once."""
    kept: list[Any] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return tuple(kept)
