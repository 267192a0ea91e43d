"""Backend `flash`: sliding windows and full attention on FlashAttention's kernels, on CUDA.

The newest library that is installed and able serves a call: FlashAttention-4, 3 or 2. Rows of
different lengths are packed, so that padding is not computed. Fewer queries than keys are the last
ones, which is how these kernels align their masks.

Tested against stand-ins with the libraries' signatures, computed on the CPU; of the libraries,
FlashAttention-3 (fa3-fwd 0.0.3) was run on a GPU, an H200, for full attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans
from sa_patch.kernels.flash.libraries import LIBRARIES, Library, Need, Window
from sa_patch.patterns import SWA, Pattern

_DTYPES = (torch.float16, torch.bfloat16)


def supports(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[bool, str]:
    longest = k.shape[2]
    if not pattern.saturated(longest) and not isinstance(pattern, SWA):
        return False, "flash serves full attention and sliding windows only"
    if q.device.type != "cuda":
        return False, f"FlashAttention runs on CUDA GPUs only, not on {q.device.type!r}"
    library = _able(_need(q, k, windowed=not pattern.saturated(longest)))
    return (False, library) if isinstance(library, str) else (True, "")


def _need(*tensors: Tensor, windowed: bool) -> Need:
    q = tensors[0]
    return Need(
        windowed=windowed,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        capability=torch.cuda.get_device_capability(q.device),
        gradients=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
    )


def _able(need: Need) -> Library | str:
    """The newest library that can serve, or why none can."""
    if need.dtype not in _DTYPES:
        return f"FlashAttention takes float16 and bfloat16, not {str(need.dtype).split('.')[-1]}"
    installed = [library for library in LIBRARIES if library.load() is not None]
    if not installed:
        return "no FlashAttention library is installed (flash-attn, flash-attn-4 or fa3-fwd)"
    refusals = []
    for library in installed:
        refusal = library.refusal(need)
        if not refusal:
            return library
        refusals.append(refusal)
    return "; ".join(refusals)


def _library(q: Tensor, k: Tensor, v: Tensor, *, windowed: bool) -> Library:
    if q.device.type != "cuda":
        raise UserError(f"FlashAttention runs on CUDA GPUs only, not on {q.device.type!r}")
    library = _able(_need(q, k, v, windowed=windowed))
    if isinstance(library, str):
        raise UserError(library)
    return library


def attend(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    spans: Spans,
    scale: float,
    softmax: Softmax = PLAIN,
) -> Tensor:
    window: Window = (None, 0)
    if not pattern.saturated(max(spans.lengths)):
        # A pattern saturated at n may not be named by `supports`' word for longer keys.
        if not isinstance(pattern, SWA):
            raise UserError("flash serves full attention and sliding windows only")
        window = (pattern.window - 1, 0)
    library = _library(q, k, v, windowed=window[0] is not None)
    return causal_rows(library, q, k, v, spans=spans, window=window, scale=scale)


def causal_rows(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: Spans,
    window: Window,
    scale: float,
) -> Tensor:
    """Causal attention of a batch by one library; shapes as `Attend`, zero at padding."""
    queries, seq_len = q.shape[2], k.shape[2]
    # Of each row: real queries, and the keys up to the last of them.
    counts = [
        max(0, min(queries, n - start))
        for n, start in zip(spans.lengths, spans.starts, strict=True)
    ]
    ends = [start + count for start, count in zip(spans.starts, counts, strict=True)]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if set(counts) == {queries} and set(ends) == {seq_len}:
        out = library.dense(q, k, v, window=window, causal=True, scale=scale)
        return out.transpose(1, 2)
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        return q.new_zeros(q.shape).transpose(1, 2)
    # Empty rows are left out: flash-attn 2 fails on them where all others hold one query.
    packed = library.packed(
        torch.cat([q[row, : counts[row]] for row in rows]),
        torch.cat([k[row, : ends[row]] for row in rows]),
        torch.cat([v[row, : ends[row]] for row in rows]),
        [counts[row] for row in rows],
        [ends[row] for row in rows],
        window=window,
        causal=True,
        scale=scale,
    )
    parts = dict(zip(rows, packed.split([counts[row] for row in rows]), strict=True))
    empty = packed[:0]
    padded = [
        torch.nn.functional.pad(parts.get(row, empty), (0, 0, 0, 0, 0, queries - counts[row]))
        for row in range(len(q))
    ]
    return torch.stack(padded).transpose(1, 2)


def full(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Full causal attention, for comparison.

    Args:
        q: ``[batch, q_heads, n, head_dim]``.
        k, v: ``[batch, kv_heads, n, head_dim]``.
        scale: factor of the scores.

    Returns:
        as q.

    Raises:
        UserError: where no installed library can serve, with the reasons.
    """
    library = _library(q, k, v, windowed=False)
    return _uniform(library, q, k, v, window=(None, 0), causal=True, scale=scale)


def banded(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float) -> Tensor:
    """The band ``-right <= i - j <= left``, not causal unless `right` is 0, for comparison.

    Shapes and errors as `full`.
    """
    library = _library(q, k, v, windowed=True)
    return _uniform(library, q, k, v, window=(left, right), causal=False, scale=scale)


def _uniform(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    causal: bool,
    scale: float,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = library.dense(q, k, v, window=window, causal=causal, scale=scale)
    return out.transpose(1, 2)


def version() -> str | None:
    """The newest library installed, such as "FlashAttention-3 (fa3_fwd 0.0.3)"; None for none.

    It need not be able to serve every call: `serving` names the one that does.
    """
    return next(iter(installed_versions()), None)


def installed_versions() -> list[str]:
    """Every library installed, newest first."""
    return [found for library in LIBRARIES if (found := library.version()) is not None]


def serving(q: Tensor, k: Tensor, *, windowed: bool) -> str:
    """Name and version of the library that `full` (or `banded`, where windowed) would take.

    Raises:
        UserError: where none can serve, with the reasons.
    """
    return str(_library(q, k, k, windowed=windowed).version())


BACKEND = Backend(
    name="flash",
    summary="FlashAttention 4, 3 or 2 on CUDA: sliding windows and full attention, fp16 and bf16",
    supports=supports,
    attend=attend,
)
