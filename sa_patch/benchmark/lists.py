"""Lists as command lines give them: patterns and numbers between commas."""

from __future__ import annotations

from collections.abc import Sequence

from sa_patch.errors import UserError


def split_names(value: str | Sequence[str]) -> tuple[str, ...]:
    """Split at commas, save those within a text form such as ``sa:window=64,seed=1``."""
    if not isinstance(value, str):
        return tuple(value)
    found: list[str] = []
    for piece in filter(None, (part.strip() for part in value.split(","))):
        continues = "=" in piece and ":" not in piece.partition("=")[0]
        if continues and found and ":" in found[-1]:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return tuple(dict.fromkeys(found))


def read_sizes(value: str | int | Sequence[int], field: str) -> tuple[int, ...]:
    """Whole numbers between commas, ``1024,2K``; ``field`` names them in messages.

    Raises:
        UserError: for what is no whole number.
    """
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return tuple(value)
    return tuple(read_size(piece.strip(), field) for piece in value.split(",") if piece.strip())


def read_size(text: str, field: str) -> int:
    """``4096`` or ``4K``.

    Raises:
        UserError: for what is no whole number.
    """
    number, factor = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    try:
        return int(number) * factor
    except ValueError as error:
        raise UserError(f"{field} takes whole numbers such as 512 or 4K, got {text!r}") from error
