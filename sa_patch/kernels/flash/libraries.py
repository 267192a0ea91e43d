"""The FlashAttention libraries, each behind the same two calls: here, and nowhere else, differ
their names, argument names, window forms, results and limits.

Sources: flash_attn 2.8 (`flash_attn_interface.py`), FlashAttention-3 (`hopper/
flash_attn_interface.py`, and the package fa3_fwd 0.0.3), flash-attn-4 4.0.0b36
(`flash_attn/cute/interface.py`). All take ``[batch, n, heads, head_dim]``, or packed rows
``[tokens, heads, head_dim]`` with cumulative lengths, and align a causal mask or a window to the
last key. Tested against stand-ins with these signatures; fa3_fwd was run on an H200 as well.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Keys before and after a query, aligned to the last key; None is unlimited.
Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class Need:
    """What a call asks of a library."""

    windowed: bool
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int]
    gradients: bool


@dataclass(frozen=True)
class Library:
    """One FlashAttention library.

    Args:
        title: name and generation.
        module: what to import; its functions are `flash_attn_func` and `flash_attn_varlen_func`.
        packages: distributions that provide it, for the version.
        unlimited: how a side of a window is written that has no limit.
        majors: major compute capabilities it runs on.
        head_dims: largest head_dim by major capability, 256 where none is given.
        extra: keyword arguments it wants besides the common ones.
        build_module: module whose CONFIG["build_flags"] say what was left out of the build.
    """

    title: str
    module: str
    packages: tuple[str, ...]
    unlimited: int | None
    majors: tuple[int, ...]
    head_dims: tuple[tuple[int, int], ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()
    build_module: str | None = None

    def load(self) -> ModuleType | None:
        """The library's module; None where it is not installed or does not load."""
        return _import(self.module)

    def version(self) -> str | None:
        """Such as "FlashAttention-3 (fa3_fwd 0.0.3)"; None where it is not installed."""
        module = self.load()
        if module is None:
            return None
        for package in self.packages:
            try:
                return f"{self.title} ({package} {importlib.metadata.version(package)})"
            except importlib.metadata.PackageNotFoundError:
                continue
        return f"{self.title} ({getattr(module, '__version__', 'version unknown')})"

    def refusal(self, need: Need) -> str:
        """Why this library cannot serve a call; empty where it can."""
        if self.load() is None:
            return f"{self.title} is not installed"
        major = need.capability[0]
        if major not in self.majors:
            return f"{self.title} does not run on compute capability {major}.{need.capability[1]}"
        largest = dict(self.head_dims).get(major, 256)
        if need.head_dim > largest:
            return f"{self.title} takes a head_dim of at most {largest} here, got {need.head_dim}"
        left_out = self._left_out(need)
        return f"{self.title}, as built, lacks {left_out}" if left_out else ""

    def _left_out(self, need: Need) -> str:
        module = _import(self.build_module) if self.build_module else None
        flags = getattr(module, "CONFIG", {}).get("build_flags", {})
        sizes = [size for size in (64, 96, 128, 192, 256) if size >= need.head_dim]
        wanted = {
            "LOCAL": ("sliding windows", need.windowed),
            "FP16": ("float16", need.dtype == torch.float16),
            "BACKWARD": ("gradients", need.gradients),
            "VARLEN": ("rows of different lengths", True),
            "SM8x": ("compute capability 8", need.capability[0] == 8),
        }
        for flag, (what, wants) in wanted.items():
            if wants and flags.get(f"FLASHATTENTION_DISABLE_{flag}"):
                return what
        if all(flags.get(f"FLASHATTENTION_DISABLE_HDIM{size}") for size in sizes):
            return f"head_dim {need.head_dim}"
        return ""

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: Window, causal: bool, scale: float
    ) -> Tensor:
        """Rows of one length: q ``[batch, nq, q_heads, head_dim]``, k and v alike; as q."""
        return self._call("flash_attn_func", (q, k, v), window, causal, scale)

    def packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_lengths: list[int],
        key_lengths: list[int],
        *,
        window: Window,
        causal: bool,
        scale: float,
    ) -> Tensor:
        """Rows of any length, none of them empty, one after the other.

        Args:
            q: ``[sum of query_lengths, q_heads, head_dim]``.
            k, v: ``[sum of key_lengths, kv_heads, head_dim]``.

        Returns:
            as q.
        """
        return self._call(
            "flash_attn_varlen_func",
            (q, k, v),
            window,
            causal,
            scale,
            cu_seqlens_q=_cumulative(query_lengths, q.device),
            cu_seqlens_k=_cumulative(key_lengths, q.device),
            max_seqlen_q=max(query_lengths),
            max_seqlen_k=max(key_lengths),
        )

    def _call(
        self,
        function: str,
        tensors: tuple[Tensor, ...],
        window: Window,
        causal: bool,
        scale: float,
        **lengths: Any,
    ) -> Tensor:
        q, k, v = tensors
        head_dim = q.shape[-1]
        # All kernels want rows of 16 bytes; zeros change neither scores nor the kept outputs.
        if head_dim % 8:
            q, k, v = (torch.nn.functional.pad(x, (0, -head_dim % 8)) for x in tensors)
        call: Callable[..., Any] = getattr(self.load(), function)
        left, right = (self.unlimited if side is None else side for side in window)
        result = call(
            q,
            k,
            v,
            softmax_scale=scale,
            causal=causal,
            window_size=(left, right),
            **lengths,
            **dict(self.extra),
        )
        # Some versions return the log-sum-exp as well, asked or not.
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out[..., :head_dim]


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends, dtype=torch.int32, device=device)


@cache
def _import(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    # A library built for another torch or CUDA fails to load with almost any error.
    except Exception:
        return None


# Newest first. FlashAttention-4 also names 8.x and 12.x, in its latest versions only.
LIBRARIES = (
    Library(
        title="FlashAttention-4",
        module="flash_attn.cute",
        packages=("flash-attn-4", "fa4"),
        unlimited=None,
        majors=(9, 10, 11),
        head_dims=((10, 128), (11, 128)),
    ),
    Library(
        title="FlashAttention-3",
        module="flash_attn_interface",
        packages=("flash_attn_3",),
        unlimited=-1,
        majors=(8, 9),
        build_module="flash_attn_config",
    ),
    Library(
        title="FlashAttention-3",
        module="fa3_fwd_interface",
        packages=("fa3_fwd",),
        unlimited=-1,
        majors=(8, 9),
        build_module="fa3_fwd_config",
    ),
    Library(
        title="FlashAttention-2",
        # `flash_attn` alone may be the namespace that flash-attn-4 opens.
        module="flash_attn.flash_attn_interface",
        packages=("flash_attn",),
        unlimited=-1,
        majors=(8, 9, 10, 11, 12),
        extra=(("dropout_p", 0.0),),
    ),
)
