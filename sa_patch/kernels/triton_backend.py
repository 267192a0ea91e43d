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
from sa_patch.kernels import triton_configs
from sa_patch.kernels.backend import Backend, Spans
from sa_patch.kernels.triton_configs import (
    UNLIMITED,
    BandConfig,
    Config,
    MobaConfig,
    band_config,
    moba_config,
)
from sa_patch.kernels.triton_plans import Row
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_MIN_CAPABILITY = (8, 0)
# Given to kernels in place of 0, which would turn the -inf of a hidden key to NaN.
_TINY_SCALE = 1e-30


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
        found = torch.cuda.get_device_capability(device)
        if found < _MIN_CAPABILITY:
            return f"the GPU has compute capability {found[0]}.{found[1]}, 8.0 or later is needed"
        return ""
    if device.type != "cpu":
        return f"the tensors are on {device.type}, the kernels run on CUDA GPUs"
    if not interpreting():
        return (
            "the tensors are on the CPU, where only Triton's interpreter runs (TRITON_INTERPRET=1)"
        )
    kernels = sys.modules.get("sa_patch.kernels.triton_softmax")
    if kernels is not None and not kernels.INTERPRETED:
        return "TRITON_INTERPRET was set after the kernels were loaded; set it before the start"
    return ""


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _wrong_problem(pattern: Pattern, q: Tensor, k: Tensor) -> str:
    if not isinstance(pattern, (Full, SWA, SA, MoBA)):
        return f"triton has no rule for the pattern {pattern.name!r}"
    if q.dtype not in _DTYPES or k.dtype != q.dtype:
        return f"the kernels take float32, float16 or bfloat16, got {q.dtype} and {k.dtype}"
    if q.shape[3] > _MAX_HEAD_DIM:
        return f"head_dim is {q.shape[3]}, at most {_MAX_HEAD_DIM} is possible"
    if isinstance(pattern, SA) and q.shape[2] < k.shape[2] and not pattern.saturated(k.shape[2]):
        return "there are cached keys, and stochastic attention needs whole sequences here"
    return ""


def _wrong_gradient(*tensors: Tensor) -> str:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "the kernels compute no gradients; use torch.no_grad() or backend='banded'"
    return ""


def attend(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, layer: int, spans: Spans, scale: float
) -> Tensor:
    return _attend(pattern, q, k, v, layer, spans, scale, False, None)[0]


def attend_with_lse(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    spans: Spans,
    scale: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend`, with the logarithm of each query's sum of exponentials.

    Args:
        config: launch parameters in place of the table's.

    Returns:
        the output, like `q`, and the natural log-sum-exp of the scaled scores of the visible keys,
        fp32 ``[batch, q_heads, nq]``, -inf at padding.

    Raises:
        UserError: if `v` needs a gradient.
    """
    out, lse = _attend(pattern, q, k, v, layer, spans, scale, True, config)
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
    config: Config | None,
) -> tuple[Tensor, Tensor | None]:
    if reason := _wrong_gradient(q, k, v):
        raise UserError(f"backend 'triton' cannot serve {pattern}: {reason}")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if scale < 0:
        q = -q
    scale = max(abs(scale), _TINY_SCALE)
    rows = tuple(
        Row(b, *span) for b, span in enumerate(zip(spans.starts, spans.lengths, strict=True))
    )
    whole = all(row.length - row.start >= q.shape[2] for row in rows)
    out = torch.empty_like(q) if whole else torch.zeros_like(q)
    lse = None
    if with_lse:
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _launch(pattern, q, k, v, out, lse, rows, layer, scale, config)
    return out, lse


def _launch(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    rows: tuple[Row, ...],
    layer: int,
    scale: float,
    config: Config | None,
) -> None:
    """Serve every row; rows that a pattern saturates see all keys before them."""
    from sa_patch.kernels import triton_launch as launch
    from sa_patch.kernels.triton_moba_launch import launch_moba
    from sa_patch.kernels.triton_softmax import INTERPRETED

    device = triton_configs.device_class(q.device, interpreted=INTERPRETED)
    longest = max(row.length for row in rows)
    if isinstance(pattern, MoBA) and not pattern.saturated(longest):
        if not isinstance(config, MobaConfig):
            config = moba_config(q, longest, pattern.block_size, device)
        launch_moba(pattern, q, k, v, out, lse, rows=rows, scale=scale, config=config)
        return
    if not isinstance(config, BandConfig):
        config = band_config(q, longest, device)
    window = pattern.window if isinstance(pattern, SWA) else UNLIMITED
    if isinstance(pattern, SA):
        ring = tuple(row for row in rows if not pattern.saturated(row.length))
        rows = tuple(row for row in rows if pattern.saturated(row.length))
        if ring:
            launch.launch_ring(
                pattern, q, k, v, out, lse, rows=ring, layer=layer, scale=scale, config=config
            )
    if rows:
        launch.launch_window(
            q, k, v, out, lse, rows=rows, window=window, scale=scale, config=config
        )


BACKEND = Backend(
    name="triton",
    summary="our own fused kernels on CUDA GPUs (capability 8.0 and later), forward only",
    supports=supports,
    attend=attend,
)
