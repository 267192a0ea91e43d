"""Backend `flash`: FlashAttention's kernels on CUDA, for every pattern where FlashAttention-4 is.

Full attention and sliding windows go to the newest library that is installed and able:
FlashAttention-4, 3 or 2. Rows of different lengths are packed, so that padding is not computed.
Fewer queries than keys are the last ones, which is how these kernels align their masks. All other
patterns are block plans, which FlashAttention-4 alone can walk.

Tested against stand-ins with the libraries' signatures, and block plans by walking them, on the
CPU; FlashAttention-4's kernels were compiled for cards that were not there. Run on a GPU, an H200,
was FlashAttention-3 (fa3-fwd 0.0.3) alone, for full attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans
from sa_patch.kernels.flash.attention4 import KERNEL, blocks_for
from sa_patch.kernels.flash.libraries import LIBRARIES, Library, Need, Window
from sa_patch.kernels.flash.rows import causal_rows, packed_rows, sequences_as_rows
from sa_patch.kernels.flash.walk import walk_rows
from sa_patch.kernels.plans.plan import KINDS
from sa_patch.patterns import SWA, Pattern, parts_of

_DTYPES = (torch.float16, torch.bfloat16)
# Where its kernels compile with a mask, lists and the log-sum-exp together (eval/results/gpu).
PLAN_MAJORS = (9, 10)


def supports(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[bool, str]:
    if q.device.type != "cuda":
        return False, f"FlashAttention runs on CUDA GPUs only, not on {q.device.type!r}"
    if by_library(pattern, k.shape[2]):
        library = _able(_need(q, k, windowed=not pattern.saturated(k.shape[2])))
        return (False, library) if isinstance(library, str) else (True, "")
    reason = plan_refusal(pattern, _need(q, k, windowed=False))
    if not reason and q.shape[2] != k.shape[2] and not pattern.prefix_stable:
        reason = f"flash computes {pattern.name} on whole prompts only"
    return not reason, reason


def by_library(pattern: Pattern, longest: int) -> bool:
    """Whether the libraries' own windows show what a pattern does; else it is a block plan."""
    return isinstance(pattern, SWA) or pattern.saturated(longest)


def plan_refusal(pattern: Pattern, need: Need) -> str:
    """Why FlashAttention-4 cannot walk the block plan of a pattern; empty where it can."""
    if unknown := [part.name for part in parts_of(pattern) if not isinstance(part, KINDS)]:
        return f"flash has no rule for the pattern {unknown[0]!r}"
    if pattern.weighs_scores and need.head_dim % 8:
        return f"flash pads a head_dim of {need.head_dim}, which changes what a threshold weighs"
    if need.dtype not in _DTYPES:
        return f"FlashAttention takes float16 and bfloat16, not {str(need.dtype).split('.')[-1]}"
    major = need.capability[0]
    if major not in PLAN_MAJORS:
        return (
            "FlashAttention-4 walks lists of key blocks on compute capability 9.x and 10.x, not on "
            f"{major}.{need.capability[1]}"
        )
    if need.gradients:
        return "FlashAttention-4 computes no gradients here over lists of key blocks"
    return LIBRARIES[0].refusal(need)


def attention4_serves(pattern: Pattern, q: Tensor, k: Tensor) -> bool:
    """Whether FlashAttention-4 itself, and no older library, would serve a call."""
    able, _ = supports(pattern, q, k)
    return able and not LIBRARIES[0].refusal(_need(q, k, windowed=isinstance(pattern, SWA)))


def refuses(softmax: Softmax) -> str:
    if softmax is PLAIN or LIBRARIES[0].load() is not None:
        return ""
    return "soft caps and learned sinks need FlashAttention-4, which is not installed"


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
    if not by_library(pattern, max(spans.lengths)) or softmax is not PLAIN:

        def rows(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
            own = {"layer": layer, "spans": spans, "scale": scale, "softmax": softmax}
            return _attend_plans(pattern, q, k, v, own)

        if spans.packed_in is None:
            return rows(q, k, v, spans)
        return sequences_as_rows(pattern, q, k, v, spans, rows)
    window: Window = (None, 0)
    if isinstance(pattern, SWA) and not pattern.saturated(max(spans.lengths)):
        window = (pattern.window - 1, 0)
    library = _library(q, k, v, windowed=window[0] is not None)
    if spans.packed_in is not None:
        return packed_rows(library, q, k, v, spans=spans, window=window, scale=scale)
    return causal_rows(library, q, k, v, spans=spans, window=window, scale=scale)


def _attend_plans(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, own: dict[str, Any]) -> Tensor:
    need = _need(q, k, v, windowed=False)
    if reason := plan_refusal(pattern, need):
        raise UserError(reason)
    return walk_rows(
        pattern,
        q,
        k,
        v,
        **own,
        blocks=blocks_for(need.capability[0], q.shape[3]),
        kernel=KERNEL,
    )


def full(q: Tensor, k: Tensor, v: Tensor, scale: float, library: Library | None = None) -> Tensor:
    """Full causal attention, for comparison.

    Args:
        q: ``[batch, q_heads, n, head_dim]``.
        k, v: ``[batch, kv_heads, n, head_dim]``.
        scale: factor of the scores.
        library: of `able_libraries`; the newest able one unless given.

    Returns:
        as q.

    Raises:
        UserError: where no installed library can serve, with the reasons.
    """
    library = library or _library(q, k, v, windowed=False)
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


def able_libraries(q: Tensor, k: Tensor) -> dict[str, Library | str]:
    """Each library that `full` could take, or why it cannot, by name and generation; newest first.

    Shapes as `full`.
    """
    if q.device.type != "cuda":
        reason = f"FlashAttention runs on CUDA GPUs only, not on {q.device.type!r}"
        return {library.title: reason for library in LIBRARIES}
    return _by_generation(_need(q, k, windowed=False))


def _by_generation(need: Need) -> dict[str, Library | str]:
    found: dict[str, Library | str] = {}
    for library in LIBRARIES:
        known = found.get(library.title)
        # A generation comes in several packages.
        if known is None or (isinstance(known, str) and library.load() is not None):
            found[library.title] = _refusal(library, need) or library
    return found


def _refusal(library: Library, need: Need) -> str:
    if need.dtype not in _DTYPES:
        return f"FlashAttention takes float16 and bfloat16, not {str(need.dtype).split('.')[-1]}"
    return library.refusal(need)


def serving(q: Tensor, k: Tensor, *, windowed: bool) -> str:
    """Name and version of the library that `full` (or `banded`, where windowed) would take.

    Shapes as `full`.

    Raises:
        UserError: where none can serve, with the reasons.
    """
    return str(_library(q, k, k, windowed=windowed).version())


BACKEND = Backend(
    name="flash",
    summary="FlashAttention on CUDA, fp16 and bf16: windows and full; with version 4 every pattern",
    supports=supports,
    attend=attend,
    packs=lambda pattern: True,
    refuses=refuses,
)
