"""Settings from YAML files: pydantic models whose mistakes are told in one clear sentence."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from sa_patch.errors import UserError, choice, not_allowed, suggest

STDIN = Path("-")


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A list's values, one value alone as a list of one, nothing as an empty list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


# In front of a tuple's type, since YAML has lists only, which strict validation would refuse.
# ``windows: Annotated[tuple[int, ...], LISTED] = ()``
LISTED = BeforeValidator(as_tuple)


def read_fraction(text: str) -> float:
    """The number that is written ``1/8`` or ``0.125``; NaN where it is neither."""
    top, _, bottom = text.replace(" ", "").partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return math.nan


def text_is(key: str) -> BeforeValidator:
    """In front of settings: a text alone stands for the mapping that has only this key."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def one_of(what: str, allowed: Iterable[str]) -> AfterValidator:
    """Behind text: it must be one of these, and the nearest one is named if it is not."""
    return AfterValidator(lambda value: choice(value, what, allowed))


def _not_empty(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty", "text that is not empty")
    return text


Text = Annotated[str, AfterValidator(_not_empty)]
Positive = Annotated[int, Field(ge=1)]


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
            return cls.model_validate(raw)
        except ValidationError as error:
            # A misspelt key explains what is missing in its place.
            errors = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
            raise UserError(_sentence(cls, what, errors[0])) from error

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """A copy that takes from `defaults` what was not given to these settings.

        Settings and mappings in them are completed in their turn, key by key. Defaults of other
        names are passed over.
        """
        found: dict[str, Any] = {}
        for key in type(self).model_fields.keys() & defaults.keys():
            own, default = getattr(self, key), defaults[key]
            if key not in self.model_fields_set:
                found[key] = default
            elif isinstance(own, Settings):
                found[key] = own.completed(dict(default))
            elif isinstance(own, dict):
                found[key] = {**default, **own}
        return self.model_copy(update=found)


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


# What pydantic's kinds of errors demand, in words; the rest is left in its own.
_DEMANDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "dict_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
}
_LITERALS = re.compile(r"'([^']*)'|(\d+)")


def _sentence(settings: type[BaseModel], what: str, error: ErrorDetails) -> str:
    *place, key = error["loc"] or ("",)
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    where = repr(_name(place)) if place else what
    if kind == "missing":
        return f"{where} lacks the key {key!r}"
    if kind in ("extra_forbidden", "invalid_key"):
        fields = _model_at(settings, place).model_fields
        known = [field.alias or name for name, field in fields.items()]
        return f"unknown key {key!r} in {where}{suggest(str(key), known)} known: {', '.join(known)}"
    name = _name(error["loc"]) or what
    if kind == "value_error":
        reason = context.get("error")
        return str(reason) if isinstance(reason, UserError) else f"{name}: {reason}"
    if kind == "literal_error":
        allowed = [text or number for text, number in _LITERALS.findall(context["expected"])]
        return not_allowed(given, name, allowed)
    demand = _DEMANDS.get(kind, error["msg"].removeprefix("Input should be ")).format(**context)
    return f"{name} must be {demand}, got {list(given) if isinstance(given, tuple) else given!r}"


def _name(place: Sequence[int | str]) -> str:
    """``model[1].resources.gpus``"""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return "".join(steps).removeprefix(".")


def _model_at(settings: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The settings that stand at a place in others; list positions are passed over."""
    for step in place:
        fields = {field.alias or name: field for name, field in settings.model_fields.items()}
        field = fields.get(str(step))
        settings = (field and _settings_in(field.annotation)) or settings
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
