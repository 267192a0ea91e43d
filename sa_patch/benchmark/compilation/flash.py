"""Backend `flash` compiled for cards that are not there: which patterns, and what kernels need.

FlashAttention-4 compiles to machine code from fake tensors; plans are made of real ones, on the
CPU. Call `compile_in_child`: the card is read from the environment when the library is imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_patch.benchmark.compilation.triton import machine_code_needs
from sa_patch.errors import one_line

ARCHITECTURES = {(8, 0): "sm_80", (9, 0): "sm_90a", (10, 0): "sm_100a"}
# Each kind of mask, and a union of several.
PATTERNS = (
    "swa:256",
    "sa:256",
    "sa:256,per_head=true",
    "psa:256",
    "sinks:4+swa:256",
    "moba:window=256",
    "block_topk:16,16",
    "block_topk:8,8,8,branch=0,shared=32,segment=128",
    "block_topk:16,8,shared=32",
    "sinks:4+swa:128+psa:128",
)
# Of an A100, H100 and B200.
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
SEQ_LEN, HEADS, KV_HEADS = 1024, 32, 8


@dataclass(frozen=True)
class CompiledPattern:
    """What came of one pattern on one kind of GPU; memory in bytes, the most of its kernels."""

    capability: tuple[int, int]
    dtype: str
    head_dim: int
    pattern: str
    refusal: str
    """Why it does not compile; empty where it does."""
    seconds: float
    kernels: int
    """Compiled for it, beyond those of patterns before it."""
    code: int
    registers: int
    """Of a thread."""
    spilled: int


Case = tuple[tuple[int, int], str, int]
"""Capability, dtype and head_dim."""


def compile_in_child(
    cases: Sequence[Case], processes: int = 1, patterns: Sequence[str] = PATTERNS
) -> list[CompiledPattern]:
    """Compile patterns for each case, each in its own process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        found = pool.map(compile_patterns, cases, [tuple(patterns)] * len(cases))
        return [one for several in found for one in several]


def compile_patterns(case: Case, patterns: Sequence[str]) -> list[CompiledPattern]:
    """Compile every pattern, with 32 query and 8 KV heads."""
    capability, dtype, head_dim = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(capability, folder)
        found: list[CompiledPattern] = []
        for text in patterns:
            needs: list[tuple[int, int, int]] = []
            began = time.monotonic()
            take = partial(_take, folder, needs)
            refusal = _compile(text, capability[0], getattr(torch, dtype), head_dim, take)
            seconds = round(time.monotonic() - began, 1)
            most = [max(each, default=0) for each in zip(*needs, strict=True)] or [0, 0, 0]
            found.append(
                CompiledPattern(
                    capability, dtype, head_dim, text, refusal, seconds, len(needs), *most
                )
            )
        return found


def _take(folder: Path, needs: list[tuple[int, int, int]]) -> None:
    """What new machine code needs; taken away, for the next may have the same name."""
    for code in folder.glob("**/*.cubin"):
        content = code.read_bytes()
        needs.append((len(content), *machine_code_needs(content)))
        code.unlink()


def prepare(capability: tuple[int, int], folder: Path | None = None) -> None:
    """Name the card, and where machine code is kept, before the library is imported."""
    name = ARCHITECTURES[capability]
    os.environ.update(FLASH_ATTENTION_ARCH=name.rstrip("a"), CUTE_DSL_ARCH=name)
    os.environ["FLASH_ATTENTION_NUM_SMS"] = str(_MULTIPROCESSORS[capability])
    if folder is not None:
        os.environ.update(CUTE_DSL_KEEP_CUBIN="1", CUTE_DSL_DUMP_DIR=str(folder))
    # It warns of being given fake tensors.
    warnings.filterwarnings("ignore")
    from cutlass.utils import HardwareInfo

    # On Blackwell a driver is asked for what says how large a launch is.
    count = _MULTIPROCESSORS[capability]
    HardwareInfo.__init__ = lambda self, device_id=0: None
    HardwareInfo.get_device_multiprocessor_count = lambda self: count
    HardwareInfo.get_max_active_clusters = lambda self, cluster_size: count // cluster_size


def _compile(
    text: str, major: int, dtype: torch.dtype, head_dim: int, compiled: Callable[[], None]
) -> str:
    """Why a pattern does not compile; empty where it does."""
    from sa_patch.kernels.flash.attention4 import blocks_for
    from sa_patch.kernels.flash.walk import attend_plans
    from sa_patch.patterns import SWA, parse_pattern

    pattern = parse_pattern(text)
    q, k, v = (
        torch.zeros(1, h, SEQ_LEN, head_dim, dtype=dtype) for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    try:
        if isinstance(pattern, SWA):
            with _fake() as fake:
                _compile_window(pattern.window, *(fake(x).transpose(1, 2) for x in (q, k, v)))
            compiled()
            return ""

        blocks = blocks_for(major, head_dim)
        attend_plans(pattern, q, k, v, layer=0, scale=0.1, blocks=blocks, kernel=compiler(compiled))
    # Whatever the compiler refuses is the answer.
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return ""


def _compile_window(window: int, *tensors: Tensor) -> None:
    from flash_attn.cute.interface import _flash_attn_fwd

    _flash_attn_fwd(*tensors, window_size_left=window - 1, window_size_right=0)


def compiler(compiled: Callable[[], None] = lambda: None) -> Any:
    """A `Kernel` that is compiled and not run; `compiled` is called after each."""
    from sa_patch.kernels.flash.attention4 import KERNEL
    from sa_patch.kernels.flash.walk import Kernel

    def only(call: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        def compile_only(q: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
            with _fake() as fake:
                call(*(_faked(x, fake) for x in (q, *given)))
            compiled()
            return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)

        return compile_only

    return Kernel(*map(only, KERNEL))


def _faked(x: Any, fake: Callable[[Tensor], Tensor]) -> Any:
    """Fake tensors for those in named tuples, however deep, that kernels are handed."""
    if isinstance(x, Tensor):
        # Kernels read no int64: numbers are taken from it on the CPU.
        return x if x.dtype == torch.int64 else fake(x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_faked(one, fake) for one in x))
    return x


@contextlib.contextmanager
def _fake() -> Iterator[Any]:
    """What makes a fake tensor on a GPU of a real one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
