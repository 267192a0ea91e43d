"""What command lines give: options, lists, numbers; without torch, so that --help is immediate."""

from __future__ import annotations

from collections.abc import Sequence

from sa_patch.errors import UserError

# Name, placeholder and help of every option that a benchmark of attention takes, all as text.
ATTENTION_OPTIONS: tuple[tuple[str, str, str], ...] = (
    ("n", "LIST", "lengths, such as 1024,2048 or 1K,2K (default: 1K to 16K; on CUDA 2K to 128K)"),
    ("heads", "COUNT", "query heads (default: 8; on CUDA 32)"),
    ("kv-heads", "COUNT", "KV heads (default: 2; on CUDA 8)"),
    ("head-dim", "WIDTH", "width of a head (default: 64; on CUDA 128)"),
    ("window", "LIST", "windows of the methods that name none (default: 256)"),
    ("methods", "LIST", "sa, swa, moba, full, or text forms such as moba:block_size=512,topk=3"),
    ("backends", "LIST", "backends to measure (default: all)"),
    ("dtype", "NAME", "float32, bfloat16 or float16 (default: float32; on CUDA bfloat16)"),
    ("device", "NAME", "cpu or cuda (default: cuda where torch sees one)"),
    ("threads", "COUNT", "torch threads (default: torch's own)"),
    ("batch", "ROWS", "sequences in a batch (default: 1)"),
    ("repeats", "COUNT", "most repetitions of a cell (default: 15; on CUDA 30)"),
    ("budget", "SECONDS", "time for the whole run (default: 270)"),
    ("out", "DIR", "folder of the results (default: runs/bench)"),
    ("seed", "NUMBER", "of inputs, sampled queries and the order of calls (default: 0)"),
)


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
