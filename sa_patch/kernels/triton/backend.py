"""Backend `triton`: our own fused forward kernels on CUDA GPUs, and on the CPU under Triton's
interpreter, which only serves to test them.

Nothing of size n x n is held, and no keys are copied for query heads that share them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans, any_softmax
from sa_patch.kernels.triton.launch_table import Config
from sa_patch.kernels.triton.parts import disjoint_parts
from sa_patch.kernels.triton.tiles import Row
from sa_patch.patterns import SA, Pattern

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_MIN_CAPABILITY = (8, 0)


def supports(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[bool, str]:
    reason = (
        _no_triton()
        or _wrong_device(q.device)
        or _wrong_problem(pattern, q, k)
        or _wrong_gradient(q, k)
    )
    return not reason, reason


@cache
def _no_triton() -> str:
    found = importlib.util.find_spec("triton") is not None
    return "" if found else "the package triton is not installed"


def _wrong_device(device: torch.device) -> str:
    if device.type == "cuda":
        found = _capability(device)
        if found < _MIN_CAPABILITY:
            return f"the GPU has compute capability {found[0]}.{found[1]}, 8.0 or later is needed"
        return ""
    if device.type != "cpu":
        return f"the tensors are on {device.type}, the kernels run on CUDA GPUs"
    if not interpreting():
        return (
            "the tensors are on the CPU, where only Triton's interpreter runs (TRITON_INTERPRET=1)"
        )
    kernels = sys.modules.get("sa_patch.kernels.triton.softmax")
    if kernels is not None and not kernels.INTERPRETED:
        return "TRITON_INTERPRET was set after the kernels were loaded; set it before the start"
    return ""


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _wrong_problem(pattern: Pattern, q: Tensor, k: Tensor) -> str:
    parts = disjoint_parts(pattern)
    if parts is None:
        return f"triton has no rule for the pattern {pattern.name!r}"
    if q.dtype not in _DTYPES or k.dtype != q.dtype:
        return f"the kernels take float32, float16 or bfloat16, got {q.dtype} and {k.dtype}"
    if q.shape[3] > _MAX_HEAD_DIM:
        return f"head_dim is {q.shape[3]}, at most {_MAX_HEAD_DIM} is possible"
    if sum(part.shared_queries > 1 for part in parts.chosen) > 1:
        return "only one part of a pattern may share its choices in tiles of queries here"
    drawn = any(isinstance(ring, SA) for ring in parts.rings)
    if drawn and q.shape[2] < k.shape[2] and not pattern.saturated(k.shape[2]):
        return "there are cached keys, and stochastic attention needs whole sequences here"
    return ""


def _wrong_gradient(*tensors: Tensor) -> str:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "the kernels compute no gradients; use torch.no_grad() or backend='banded'"
    return ""


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
    with_lse = softmax.sink is not None
    out, lse = _attend(pattern, q, k, v, layer, spans, scale, with_lse, (), softmax.softcap)
    return out if lse is None else softmax.share(out, lse)


def attend_with_lse(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    spans: Spans,
    scale: float,
    configs: tuple[Config, ...] = (),
) -> tuple[Tensor, Tensor]:
    """`attend`, with the logarithm of each query's sum of exponentials.

    Args:
        configs: launch parameters in place of the table's, one of each kind at most.

    Returns:
        the output, like `q`, and the natural log-sum-exp of the scaled scores of the visible keys,
        fp32 ``[batch, q_heads, nq]``, -inf at padding.

    Raises:
        UserError: if `v` needs a gradient.
    """
    out, lse = _attend(pattern, q, k, v, layer, spans, scale, True, configs)
    assert lse is not None
    return out, lse


def _attend(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    spans: Spans,
    scale: float,
    with_lse: bool,
    configs: tuple[Config, ...],
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    if reason := _wrong_gradient(q, k, v):
        raise UserError(f"backend 'triton' cannot serve {pattern}: {reason}")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    members = spans.packed_in or range(len(q))
    rows = tuple(map(Row, members, spans.starts, spans.lengths))
    whole = bool(spans.packed_in) or all(row.length - row.start >= q.shape[2] for row in rows)
    out = torch.empty_like(q) if whole else torch.zeros_like(q)
    lse = None
    if with_lse:
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    # Kernels are decorated when they are imported.
    from sa_patch.kernels.triton.forward import serve
    from sa_patch.kernels.triton.launch import Call

    with torch.cuda.device_of(q):
        serve(pattern, Call(q, k, v, out, lse, rows, layer, scale, softcap=softcap), configs)
    return out, lse


def packs(pattern: Pattern) -> bool:
    """All but blocks chosen by content, whose means and sorting are laid out by rows."""
    parts = disjoint_parts(pattern)
    return parts is not None and not parts.chosen


BACKEND = Backend(
    name="triton",
    summary="our own fused kernels on CUDA GPUs (capability 8.0 and later), forward only",
    supports=supports,
    attend=attend,
    packs=packs,
    refuses=any_softmax,
)
