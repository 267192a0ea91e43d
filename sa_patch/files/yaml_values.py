"""What stands in a YAML file, checked value by value: one clear sentence for each mistake."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sa_patch.errors import UserError, suggest

STDIN = Path("-")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; ``-`` stands for standard input.

    Raises:
        UserError: if it cannot be read, with its name.
    """
    name = "standard input" if path == STDIN else str(path)
    try:
        if path == STDIN:
            return yaml.safe_load(sys.stdin.read())
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise UserError(f"{name} is not a readable YAML file: {where}") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error


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


def choice(value: Any, what: str, allowed: Sequence[str]) -> str:
    """`value` if it is one of `allowed`, else a `UserError` with the nearest one."""
    if value not in allowed:
        near = suggest(str(value), list(allowed))
        raise UserError(f"unknown {what} {value!r}{near} allowed: {', '.join(allowed)}")
    return str(value)


def unique(items: Any) -> tuple[Any, ...]:
    """The items in their order, equal ones once."""
    kept: list[Any] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return tuple(kept)
