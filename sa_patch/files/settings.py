"""Settings from YAML files: pydantic models whose mistakes are told in one clear sentence."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from sa_patch.errors import UserError, suggest

STDIN = Path("-")


def _as_list(value: Any) -> Any:
    if value is None:
        return ()
    return value if isinstance(value, (list, tuple)) else (value,)


# In front of a tuple's type: one value alone stands for a list of one, nothing for an empty list.
# ``windows: Annotated[tuple[int, ...], LISTED] = ()``
LISTED = BeforeValidator(_as_list)


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown keys, and no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def read(cls, raw: Any, what: str) -> Self:
        """The settings that a mapping of plain values stands for, checked.

        Args:
            raw: what stands in the file, tuples as lists.
            what: its name in messages, such as "the sweep file".

        Raises:
            UserError: for the first mistake: what was given, what is allowed.
        """
        if not isinstance(raw, Mapping):
            raise UserError(f"{what} must be a mapping of keys to values, got {raw!r}")
        try:
            # Lists stand for tuples in YAML, which strict validation would refuse.
            return cls.model_validate(_tuples(raw))
        except ValidationError as error:
            raise UserError(_sentence(cls, what, error.errors()[0])) from error


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


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


def _sentence(settings: type[BaseModel], what: str, error: ErrorDetails) -> str:
    path, key = [str(step) for step in error["loc"][:-1]], str(error["loc"][-1])
    where = f"{'.'.join(path)!r}" if path else what
    kind, given = error["type"], error["input"]
    if kind == "missing":
        return f"{where} lacks the key {key!r}"
    if kind == "extra_forbidden":
        known = list(_model_at(settings, path).model_fields)
        return f"unknown key {key!r} in {where}{suggest(key, known)} known: {', '.join(known)}"
    name = ".".join([*path, key]) if error["loc"] else what
    if kind == "value_error":
        reason = error.get("ctx", {}).get("error")
        return str(reason) if isinstance(reason, UserError) else f"{name}: {reason}"
    if kind == "literal_error":
        expected = error.get("ctx", {}).get("expected", "").replace(" or ", ", ").replace("'", "")
        options = [each.strip() for each in expected.split(",")]
        return f"unknown {name} {given!r}{suggest(str(given), options)} allowed: {expected}"
    shown = list(given) if isinstance(given, tuple) else given
    demand = error["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return f"{name} must be {demand}, got {shown!r}"


def _model_at(settings: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The settings that stand at a place in others; list positions are passed over."""
    for step in path:
        if step not in settings.model_fields:
            continue
        inner = _settings_in(settings.model_fields[step].annotation)
        settings = inner or settings
    return settings


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, list, Union, UnionType, Annotated):
        for part in get_args(annotation):
            found = _settings_in(part)
            if found is not None:
                return found
    return None
