"""The text form of fractional attention as a method of pre-training: ``fna:alpha=1.2``."""

from __future__ import annotations

from dataclasses import dataclass

from sa_patch.errors import UserError
from sa_patch.patterns import Full, Pattern
from sa_patch.training.fractional.attention import check_pattern
from sa_patch.training.fractional.weights import Kernel

FRACTIONAL = "fna"
_EXAMPLE = "write fna:alpha=1.2, or fna:alpha=1.2,geometry=geodesic,pattern=sa:64"


@dataclass(frozen=True)
class Fractional:
    """Fractional attention of a language model.

    Args:
        kernel: alpha and geometry; the rest would let tokens see what follows them.
        pattern: whose pairs are computed.
    """

    kernel: Kernel
    pattern: Pattern

    def __post_init__(self) -> None:
        check_pattern(self.pattern)


def split_text(text: str) -> tuple[Kernel, str | None]:
    """What stands behind ``fna:``, and the text of the pattern, which comes last, or None.

    Raises:
        UserError: for anything unknown or not allowed.
    """
    head, mark, pattern = text.partition("pattern=")
    if mark and (not pattern or (head and not head.endswith(","))):
        raise UserError(f"{FRACTIONAL}:{text!r} is no method; {_EXAMPLE}")
    given: dict[str, str] = {}
    for place, part in enumerate(head.removesuffix(",").split(",") if head else []):
        name, equals, value = part.partition("=")
        if not equals and place == 0:
            name, value = "alpha", part
        if name not in ("alpha", "geometry") or name in given:
            raise UserError(f"{part!r} is no part of a method {FRACTIONAL}; {_EXAMPLE}")
        given[name] = value
    try:
        alpha = float(given.get("alpha", "1.2"))
    except ValueError as error:
        raise UserError(f"alpha must be a number from 1 to 2, got {given['alpha']!r}") from error
    return Kernel(alpha, given.get("geometry", "euclidean")), pattern or None


def method_text(method: Fractional, pattern: str) -> str:
    """What `split_text` reads back.

    Args:
        pattern: the pattern's own text form.
    """
    text = f"{FRACTIONAL}:alpha={method.kernel.alpha:g}"
    if method.kernel.geometry != "euclidean":
        text += f",geometry={method.kernel.geometry}"
    return text if isinstance(method.pattern, Full) else f"{text},pattern={pattern}"
