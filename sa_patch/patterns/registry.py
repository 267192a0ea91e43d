"""The patterns by name, and their text form."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern
from sa_patch.patterns.full import Full
from sa_patch.patterns.moba import MoBA
from sa_patch.patterns.sa import SA
from sa_patch.patterns.swa import SWA

PATTERNS: dict[str, type[Pattern]] = {cls.name: cls for cls in (Full, SWA, SA, MoBA)}


def suggest(word: str, known: list[str]) -> str:
    """A "; did you mean ..." clause for a misspelt word, empty where nothing is near."""
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ";"


def pattern_class(name: str) -> type[Pattern]:
    """The pattern class of a method's name.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    if not isinstance(name, str) or name not in PATTERNS:
        known = sorted(PATTERNS)
        raise UserError(
            f"unknown method {name!r}{suggest(str(name), known)} known: {', '.join(known)}"
        )
    return PATTERNS[name]


def parameters(cls: type[Pattern]) -> list[str]:
    """The parameters that `make_pattern` takes for this class, `window` among them if it can."""
    names = [field.name for field in dataclasses.fields(cls)]
    if hasattr(cls, "from_window"):
        names.append("window")
    return names


def make_pattern(name: str, **params: Any) -> Pattern:
    """Build a pattern from its name and parameters; those that are None are left out.

    ``make_pattern("moba", window=64)`` goes through `MoBA.from_window`.

    Raises:
        UserError: for an unknown method or parameter, or a value that is not allowed.
    """
    cls = pattern_class(name)
    given = {key: value for key, value in params.items() if value is not None}
    known = parameters(cls)
    for key in given:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
            raise UserError(
                f"method {name!r} has no parameter {key!r}{suggest(key, known)} {takes}"
            )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    builder: Any = cls
    if "window" in given and "window" not in fields:
        if "block_size" in given:
            raise UserError(f"give {name!r} either window or block_size, not both")
        builder = cls.from_window  # type: ignore[attr-defined]
    else:
        for key, entry in fields.items():
            if entry.default is dataclasses.MISSING and key not in given:
                raise UserError(f"method {name!r} needs {key!r}, for example {name}:{key}=64")
    built: Pattern = builder(**given)
    return built


def parse_pattern(text: str) -> Pattern:
    """Read a pattern's text form, ``name`` or ``name:key=value,key=value``.

    ``parse_pattern(str(pattern)) == pattern`` for every pattern.

    Raises:
        UserError: if the text is malformed, or names an unknown method or parameter.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"a method is written name:key=value,..., got {text!r}")
    name, _, rest = text.strip().partition(":")
    params: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{part!r} in {text!r} is not of the form key=value")
        if key.strip() in params:
            raise UserError(f"{key.strip()!r} is given twice in {text!r}")
        params[key.strip()] = parse_value(value.strip())
    return make_pattern(name.strip(), **params)


def parse_value(text: str) -> int | float | bool | str:
    """An int, float or bool where the text spells one, else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
