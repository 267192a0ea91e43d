"""Does a fused kernel compute the right thing on this device? One small case, before its first use.

A kernel that is wrong on a card, does not compile there or does not fit into its shared memory is
said once and left out by ``backend="auto"``; a backend that was named is never replaced.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sa_patch.errors import one_line
from sa_patch.kernels import reference
from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans
from sa_patch.kernels.inputs import outside_autocast
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks, parts_of

# One row fills several tiles, the other is shorter: padding is tested too.
_LENGTHS = (300, 211)
# Largest relative error of a query's output: several times what rounding gives, and far from what a
# key too many, a wrong scale or an unwritten row gives.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Of the queries of patterns that choose by content, which may choose otherwise where scores tie.
_UNDECIDED = 0.02

_FOUND: dict[tuple[Hashable, ...], str] = {}


def failures() -> dict[str, str]:
    """What was left out in this process, and why: by kind, device, dtype and shape."""
    return {" ".join(map(str, key)): reason for key, reason in _FOUND.items() if reason}


def failure(
    backend: Backend, pattern: Pattern, q: Tensor, k: Tensor, softmax: Softmax = PLAIN
) -> str:
    """Why a backend's kernels for this kind of pattern cannot be trusted here; empty if they can.

    Computed once for each device, dtype, head_dim, group size, kind of pattern and of softmax.
    """
    kind = _small(pattern)
    group = q.shape[1] // k.shape[1]
    softmax = _small_softmax(softmax, 2 * group, q)
    changed = f"softcap={softmax.softcap} sink={softmax.sink is not None}"
    key = (backend.name, kind, q.device, q.dtype, q.shape[3], group, changed)
    if key not in _FOUND:
        _FOUND[key] = ""  # what runs inside must not ask again
        _FOUND[key] = reason = _compare(backend, kind, q, group, softmax)
        if reason:
            warnings.warn(
                f"backend {backend.name!r} is left out for patterns such as {kind} on {q.device} "
                f"in {str(q.dtype).split('.')[-1]} with a head_dim of {q.shape[3]}: {reason}",
                stacklevel=2,
            )
    return _FOUND[key]


@lru_cache(maxsize=256)
def _small(pattern: Pattern) -> Pattern:
    """A pattern of the same kinds that is sparse at a few hundred tokens."""
    small = {
        Full: Full(),
        Sinks: Sinks(4),
        SWA: SWA(40),
        PSA: PSA(24),
        MoBA: MoBA(32, 3),
    }
    parts: list[Pattern] = []
    for part in parts_of(pattern):
        if isinstance(part, SA):
            parts.append(SA(24, circular=part.circular, per_head=part.per_head))
        elif isinstance(part, PSA):
            parts.append(PSA(24, per_head=part.per_head))
        elif isinstance(part, BlockTopK):
            parts.append(_small_blocks(part))
        else:
            parts.append(small.get(type(part), part))
    united = parts[0]
    for part in parts[1:]:
        united = united | part
    return united


def _small_blocks(part: BlockTopK) -> BlockTopK:
    """Blocks that are chosen, and attended to, by the same kernels as a pattern's.

    A tree's beam and branch say how a kernel is compiled; blocks of one token give it levels on
    which most queries choose.
    """
    tree: dict[str, Any] = {
        "branch": part.branch,
        "beam": part.beam,
        "percent": 30 if part.percent else 0,
        "threshold": 0.1 if part.threshold else 0.0,
    }
    if part.shared == 1:
        size = 16 if part.block_size >= 16 else 1 if part.branch else 4
        topk = min(3, part.beam * part.branch) if part.branch else 3
        return BlockTopK(size, topk, sinks=4, grouped=part.grouped, **tree)
    # Where blocks are read as pages, their size is compiled in.
    size = part.block_size if part.block_size in (16, 32) else 8
    segment = math.lcm(part.shared, size)
    return BlockTopK(
        size, 2, size, 0, grouped=part.grouped, shared=part.shared, segment=segment, **tree
    )


def _small_softmax(softmax: Softmax, heads: int, q: Tensor) -> Softmax:
    """A softmax of the same kind whose cap and sink tell in the scores of a test case."""
    if softmax is PLAIN:
        return PLAIN
    return Softmax(
        None if softmax.softcap is None else 1.0,
        None if softmax.sink is None else torch.linspace(0, 6, heads, device=q.device),
    )


def _compare(backend: Backend, pattern: Pattern, q: Tensor, group: int, softmax: Softmax) -> str:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        drawn = torch.randn(len(_LENGTHS), heads, _LENGTHS[0], q.shape[3], generator=generator)
        return drawn.to(q.device, q.dtype)

    tensors = normal(2 * group), normal(2), normal(2)
    ok, reason = backend.supports(pattern, *tensors[:2])
    if not ok:
        return reason
    spans = Spans(_LENGTHS, (0,) * len(_LENGTHS))
    own: dict[str, Any] = {
        "layer": 1,
        "spans": spans,
        "scale": q.shape[3] ** -0.5,
        "softmax": softmax,
    }
    try:
        with torch.no_grad(), outside_autocast(q):
            found = backend.attend(pattern, *tensors, **own)
            wide = (x.float() for x in tensors)
            truth = reference.BACKEND.attend(pattern, *wide, **own)
            wrong = torch.cat(
                [
                    _wrong(found[row, :, :n].float(), truth[row, :, :n], q.dtype)
                    for row, n in enumerate(_LENGTHS)
                ]
            )
    # Whatever the compiler or the driver refuses (shared memory, registers, shapes) is a reason.
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"
    share = float(wrong.float().mean())
    if share > (_UNDECIDED if pattern.reads_content else 0.0):
        return f"it differs from the reference in {share:.1%} of the queries of a test case"
    return ""


def _wrong(found: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    error = (found - truth).norm(dim=-1) / truth.norm(dim=-1)
    # NaN passes no comparison.
    return ~(error <= _TOLERANCE[dtype]).flatten()
