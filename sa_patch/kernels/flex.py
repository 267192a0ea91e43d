"""Backend `flex`: torch's FlexAttention, compiled, over lists of blocks built from the band.

One call serves a batch whatever its lengths where the pattern is prefix-stable, since causality
hides padding at the right; stochastic attention is one call for each length that occurs. Its rows
are ordered by slot, so that its ring is a band with two corners, and put back afterwards.

Run on CPUs only so far. There the first call of a family of shapes compiles C++ for some seconds.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels.backend import Backend, Spans
from sa_patch.kernels.flex_blocks import BlockLists, chosen_blocks, ring_blocks, window_blocks
from sa_patch.kernels.tensor_cache import TensorCache
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern

# `flex_kernel` is imported where it is used: it loads torch's compiler, which takes seconds.

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of FlexAttention's GPU kernels.
_SMALLEST_GPU_HEAD_DIM = 16
# An SA layer of 128K tokens takes 2.5 MiB, so that all layers of one model stay.
_plans = TensorCache(limit=256 << 20)


def supports(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[bool, str]:
    reason = _refusal(pattern, q, k)
    return not reason, reason


def _refusal(pattern: Pattern, q: Tensor, k: Tensor) -> str:
    """Why flex cannot serve a call; empty where it can."""
    if not isinstance(pattern, (Full, SWA, SA, MoBA)):
        return f"flex has no rule for the pattern {pattern.name!r}"
    if q.shape[2] != k.shape[2]:
        return "flex serves prefill only: as many queries as keys"
    if q.dtype not in _DTYPES:
        return f"flex takes float32, bfloat16 and float16, not {str(q.dtype).split('.')[-1]}"
    if q.device.type == "cpu":
        if _needs_gradients(q, k):
            return "FlexAttention computes no gradients on the CPU"
        return _cpu_refusal()
    if q.device.type != "cuda":
        return f"flex runs on CPUs and CUDA GPUs, not on {q.device.type!r}"
    if q.shape[3] < _SMALLEST_GPU_HEAD_DIM:
        return f"FlexAttention needs a head_dim of at least {_SMALLEST_GPU_HEAD_DIM} on GPUs"
    if importlib.util.find_spec("triton") is None:
        return "flex needs Triton on GPUs, and it is not installed"
    return ""


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@lru_cache(maxsize=1)
def _cpu_refusal() -> str:
    """What this machine lacks to compile FlexAttention for its CPU; empty where nothing."""
    if sys.platform != "linux":
        return "flex on CPUs was made for Linux only"
    if not torch.cpu._is_avx2_supported():
        return "FlexAttention needs an x86 CPU with AVX2"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"flex compiles C++ on CPUs, and the compiler {compiler!r} is not installed"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "flex compiles C++ on CPUs, and Python's own headers (Python.h) are not installed"
    return ""


def attend(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, layer: int, spans: Spans, scale: float
) -> Tensor:
    if q.device.type == "cpu" and _needs_gradients(q, k, v):
        raise UserError("FlexAttention computes no gradients on the CPU")
    seq_len, longest = q.shape[2], max(spans.lengths)
    if seq_len == 1:
        # One token sees itself.
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    if pattern.saturated(longest):
        return _window_rows(q, k, v, window=seq_len, scale=scale)
    if isinstance(pattern, SWA):
        return _window_rows(q, k, v, window=pattern.window, scale=scale)
    if isinstance(pattern, MoBA):
        return _chosen_rows(pattern, q, k, v, scale=scale)
    assert isinstance(pattern, SA)
    groups = spans.groups()
    if list(groups) == [(seq_len, 0)]:
        return _ring_rows(pattern, q, k, v, layer=layer, scale=scale)
    out = q.new_zeros(q.shape)
    for (length, _), members in groups.items():
        if not length:
            continue
        rows = torch.tensor(members, device=q.device)
        part = _rows_of_length(
            pattern, *(x[rows, :, :length] for x in (q, k, v)), layer=layer, scale=scale
        )
        padded = torch.nn.functional.pad(part, (0, 0, 0, seq_len - length))
        out = out.index_copy(0, rows, padded)
    return out


def _rows_of_length(
    pattern: SA, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float
) -> Tensor:
    length = q.shape[2]
    if length == 1:
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    if pattern.saturated(length):
        return _window_rows(q, k, v, window=length, scale=scale)
    return _ring_rows(pattern, q, k, v, layer=layer, scale=scale)


def _window_rows(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float) -> Tensor:
    """Rows of any length: the nearest `window` keys, in place."""
    from sa_patch.kernels import flex_kernel

    seq_len, device = q.shape[2], q.device
    block = flex_kernel.block_size(device)

    def plan() -> tuple[Tensor, ...]:
        lists = _on_device(window_blocks(seq_len, window, block), device)
        return (_number(window, device), *lists)

    width, *lists = _plans.get(("window", seq_len, window, device), plan)
    return flex_kernel.window(q, k, v, tuple(lists), width, scale)


def _ring_rows(pattern: SA, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
    """Whole rows of one length: permuted to slots, attended to as a ring, and put back."""
    from sa_patch.kernels import flex_kernel

    heads, seq_len, device = q.shape[1], q.shape[2], q.device
    block, reach = flex_kernel.block_size(device), pattern.window - 1

    def bands() -> tuple[Tensor, ...]:
        lists = _on_device(ring_blocks(seq_len, reach, pattern.circular, block), device)
        around = seq_len - reach if pattern.circular else seq_len
        return (_number(reach, device), _number(around, device), *lists)

    def draw() -> tuple[Tensor, ...]:
        order = pattern.order(seq_len, layer, heads, device)
        return order, pattern.slots(seq_len, layer, heads, device), order.int().T.contiguous()

    key = (pattern.window, pattern.circular, seq_len, device)
    near, around, *lists = _plans.get(("ring", *key), bands)
    drawn = heads if pattern.per_head else 1
    order, slots, positions = _plans.get(
        ("draw", pattern.seed, layer, drawn, pattern.per_head, seq_len, device), draw
    )
    by_slot = (_take(x, order) for x in (q, k, v))
    out = flex_kernel.ring(*by_slot, tuple(lists), positions, near, around, scale)
    return _take(out, slots)


def _chosen_rows(pattern: MoBA, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Rows of any length: own and chosen blocks.

    A block that is chosen lies before the query's own and is therefore whole and real, so that
    padding changes no choice.
    """
    from sa_patch.kernels import flex_kernel

    device = q.device
    if device.type == "cpu" and len(q) > 1:
        # Of two unknown dimensions, batch and n, the mask's code on CPUs can only index one.
        rows = zip(q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([_chosen_rows(pattern, *row, scale=scale) for row in rows])
    with torch.no_grad():
        lists, starts = chosen_blocks(pattern, q, k, flex_kernel.block_size(device))
    (size,) = _plans.get(
        ("size", pattern.block_size, device), lambda: (_number(pattern.block_size, device),)
    )
    return flex_kernel.chosen(q, k, v, _on_device(lists, device), starts, size, scale)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [batch, heads, n, head_dim]`` by ``index [draws, n]``.

    With a draw for every query head, KV heads are repeated to the query heads first.
    """
    if len(index) == 1:
        return x.index_select(2, index[0])
    x = x.repeat_interleave(len(index) // x.shape[1], dim=1)
    return x.gather(2, index[None, :, :, None].expand(len(x), -1, -1, x.shape[3]))


def _number(value: int, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=device)


def _on_device(lists: BlockLists, device: torch.device) -> tuple[Tensor, ...]:
    """Counts and blocks as the kernel takes them, then those of full blocks if there are any."""
    from sa_patch.kernels import flex_kernel

    arguments = flex_kernel.listed(lists.counts.to(device), lists.blocks.to(device))
    if lists.full_counts is None or lists.full_blocks is None:
        return arguments
    full = flex_kernel.listed(lists.full_counts.to(device), lists.full_blocks.to(device))
    return (*arguments, *full)


BACKEND = Backend(
    name="flex",
    summary="torch's FlexAttention over block lists from the band, compiled; CPU and CUDA",
    supports=supports,
    attend=attend,
)
