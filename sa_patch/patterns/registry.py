"""The patterns by name, and their text form."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError, suggest
from sa_patch.patterns.base import Pattern
from sa_patch.patterns.block_topk import BlockTopK
from sa_patch.patterns.full import Full
from sa_patch.patterns.moba import MoBA
from sa_patch.patterns.prefix_stable import PSA
from sa_patch.patterns.rivals.by_head import ByHead
from sa_patch.patterns.rivals.flashprefill import FlashPrefill
from sa_patch.patterns.rivals.flexprefill import FlexPrefill
from sa_patch.patterns.rivals.permuted_blocks import PermutedBlocks
from sa_patch.patterns.rivals.power import Power
from sa_patch.patterns.rivals.prism import Prism
from sa_patch.patterns.rivals.skip_softmax import SkipSoftmax
from sa_patch.patterns.rivals.sparge import Sparge
from sa_patch.patterns.rivals.vertical_slash import VerticalSlash
from sa_patch.patterns.rivals.xattention import XAttention
from sa_patch.patterns.sinks import Sinks
from sa_patch.patterns.sliding_window import SWA
from sa_patch.patterns.stochastic import SA
from sa_patch.patterns.tail import Tail
from sa_patch.patterns.union import unite

OURS: tuple[type[Pattern], ...] = (Full, SWA, SA, MoBA, Sinks, PSA, BlockTopK, Tail)
RIVALS: tuple[type[Pattern], ...] = (
    *(Power, VerticalSlash, XAttention, SkipSoftmax, FlexPrefill),
    *(Sparge, PermutedBlocks, Prism, FlashPrefill),
)
"""Methods of others, which `sa_patch.patterns.rivals` holds."""

_BY_HEAD = f"{ByHead.name}{{"

# Names of files that hold a pattern.
PATTERN_FILES = (".yaml", ".yml")

PATTERNS: dict[str, type[Pattern]] = {cls.name: cls for cls in (*OURS, *RIVALS)}

NAMED: dict[str, str] = {
    "shared_topk": "block_topk:16,4,16,branch=0,shared=32,segment=128,percent=10",
}
"""Names of text forms that can be given without numbers, or with other values of some parameters:
``shared_topk:percent=6``."""


def pattern_class(name: str) -> type[Pattern]:
    """The pattern class of a method's name.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    if not isinstance(name, str) or name not in PATTERNS:
        known = sorted((*PATTERNS, *NAMED))
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
    given = {key: value for key, value in params.items() if value is not None}
    if isinstance(name, str) and name in NAMED:
        name, _, rest = NAMED[name].partition(":")
        given = _parameters(name, rest, rest) | given
    cls = pattern_class(name)
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
        builder = cls.from_window  # type: ignore[attr-defined]
        beside = inspect.signature(builder).parameters
        for key in given:
            if key not in beside:
                raise UserError(f"give {name!r} either window or {key}, not both")
    else:
        for key, entry in fields.items():
            if entry.default is dataclasses.MISSING and key not in given:
                raise UserError(f"method {name!r} needs {key!r}, for example {name}:{key}=64")
    built: Pattern = builder(**given)
    return built


def is_text_form(method: str) -> bool:
    """Whether `parse_pattern` reads this, where a method's bare name may stand as well."""
    known = method.strip() in NAMED or method.strip().startswith(_BY_HEAD)
    return known or bool(set(":+") & set(method)) or method.endswith(PATTERN_FILES)


def parse_pattern(text: str) -> Pattern:
    """Read a pattern's text form: ``name:key=value,key=value``, or several joined by ``+``.

    The first values may go without their keys, in the order of the class's parameters:
    ``sinks:4+swa:60+sa:64``. Semicolons serve where commas already separate arguments.
    A pattern for each KV head is written ``heads{1*full|2*sinks:4+swa:60}``.
    ``parse_pattern(str(pattern)) == pattern`` for every pattern. The path of a YAML file, as
    ``sa-patch search`` writes it, stands for the text form under its key ``pattern``, and a name of
    `NAMED` for its own.

    Raises:
        UserError: if the text is malformed, or names an unknown method or parameter, or the file
            cannot be read.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"a method is written name:key=value,..., got {text!r}")
    if text.strip().startswith(_BY_HEAD) and text.strip().endswith("}"):
        return _parse_heads(text.strip()[len(_BY_HEAD) : -1])
    if text.endswith(PATTERN_FILES):
        text = _read_file(Path(text).expanduser())
    parts = text.split("+")
    if len(parts) == 1:
        return _parse_part(text, text)
    return unite(*(_parse_part(part, text) for part in parts))


def _parse_heads(text: str) -> Pattern:
    """What stands within the braces of ``heads{...}``."""
    patterns: list[Pattern] = []
    for run in text.split("|"):
        count, star, own = run.partition("*")
        number = parse_value(count.strip()) if star else 1
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UserError(
                f"{run.strip()!r} is not of the form NUMBER*PATTERN, for example "
                "heads{1*full|2*sinks:4+swa:60}"
            )
        patterns += [parse_pattern(own if star else run)] * number
    return ByHead(tuple(patterns))


def _read_file(path: Path) -> str:
    # Late: what times kernels alone runs where no library for settings is installed.
    from sa_patch.files.settings import read_yaml

    if not path.is_file():
        raise UserError(f"no pattern file {path}; give the path of a YAML file with a 'pattern'")
    content = read_yaml(path)
    pattern = content.get("pattern") if isinstance(content, Mapping) else None
    if not isinstance(pattern, str) or not pattern.strip() or pattern.endswith(PATTERN_FILES):
        raise UserError(
            f"{path} has no text form under 'pattern', such as pattern: sinks:4+swa:60; a file "
            "of layers is given as layers"
        )
    return pattern


def _parse_part(part: str, text: str) -> Pattern:
    """One part of the union `text`."""
    if not part.strip():
        raise UserError(f"a part of the union {text!r} is empty; it is written sinks:4+swa:60")
    name, _, rest = (word.strip() for word in part.partition(":"))
    return make_pattern(name, **_parameters(name, rest, text))


def _parameters(name: str, given: str, text: str) -> dict[str, Any]:
    """The parameters that stand behind a name."""
    # A named form has its first values already: others are given with their keys.
    fields = () if name in NAMED else dataclasses.fields(pattern_class(name))
    known = [field.name for field in fields]
    params: dict[str, Any] = {}
    pieces = [piece.strip() for piece in given.replace(";", ",").split(",")]
    leading = True
    for place, piece in enumerate(filter(None, pieces)):
        key, equals, value = (word.strip() for word in piece.partition("="))
        leading = leading and not equals
        if not equals:
            # Only the leading values can be told from a key that lacks its value.
            if not leading or place >= len(known) or not _is_value(key):
                raise UserError(f"{piece!r} in {text!r} is not of the form key=value")
            key, value = known[place], key
        if key in params:
            raise UserError(f"{key!r} is given twice in {text!r}")
        params[key] = parse_value(value)
    return params


def _is_value(text: str) -> bool:
    return not isinstance(parse_value(text), str)


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
