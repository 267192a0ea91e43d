"""The Triton kernels compiled for GPUs that are not there: registers, spills and shared memory.

A launch with a driver that only names a target stops before it runs; each kernel is compiled down
to machine code, and the `cuobjdump` that Triton brings along reports what it needs. To be called in
a process of its own without TRITON_INTERPRET: `compile_in_child`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Bytes that one program may have, by compute capability.
SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}
# Patterns that together launch every kernel with every one of its options.
PATTERNS = (
    "swa:256",
    "sa:256",
    "moba:256,3",
    "block_topk:8,8,8,branch=0,shared=32,segment=128",
    "shared_topk",
    "sinks:4+sa:64,per_head=true+psa:64+block_topk:16,4+block_topk:4,8,local=4",
    "swa:256+shared_topk",
    "sa:64+block_topk:16,4+shared_topk",
)
# Compile-time options that make another kernel of the same source.
_OPTIONS = ("CHOSEN", "JOIN", "LIMITED", "RINGS", "SPANS")


@dataclass(frozen=True)
class CompiledKernel:
    """What one launch of the table needs on one kind of GPU; memory in bytes."""

    capability: tuple[int, int]
    dtype: str
    head_dim: int
    kernel: str
    tile: str
    registers: int
    spilled: int
    """Of a thread: registers that ran out."""
    shared_memory: int
    """Of a program."""

    @property
    def fits(self) -> bool:
        """Whether a program's shared memory is there."""
        return self.shared_memory <= SHARED_MEMORY[self.capability]


class _NamedTarget:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: tuple[int, int]) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_in_child(
    cases: list[tuple[tuple[int, int], str, int]], processes: int = 1
) -> list[CompiledKernel]:
    """Compile all kernels for each (capability, dtype, head_dim), each case in its own process."""
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare,
            initargs=(cache,),
            max_tasks_per_child=1,
        ) as pool,
    ):
        found = pool.map(compile_kernels, *zip(*cases, strict=True))
        return [kernel for kernels in found for kernel in kernels]


def _prepare(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    # What versions before 3.10 take where nothing is said, with a warning.
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"


def compile_kernels(capability: tuple[int, int], dtype: str, head_dim: int) -> list[CompiledKernel]:
    """Compile every launch of `PATTERNS`, with 32 query and 8 KV heads."""
    import triton
    from triton.runtime.jit import JITFunction

    from sa_patch.kernels.backend import Spans
    from sa_patch.kernels.triton import backend, launch_table
    from sa_patch.patterns import parse_pattern

    triton.runtime.driver.set_active(_NamedTarget(capability))
    part = launch_table.class_of_capability(capability)
    vars(launch_table)["device_class"] = lambda device, interpreted: part
    run = JITFunction.run
    found: dict[CompiledKernel, None] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        name = " ".join([self.__name__, *(o.lower() for o in _OPTIONS if options.get(o))])
        if "ELEMENTS" in options:
            tile = f"{options['ELEMENTS']} elements, {options['num_warps']} warps"
        else:
            tile = (
                f"{options['BLOCK_M']} x {options['BLOCK_N']}, {options['num_warps']} warps, "
                f"{options['num_stages']} stages"
            )
        registers, spilled = machine_code_needs(compiled.asm["cubin"])
        kernel = CompiledKernel(
            capability, dtype, head_dim, name, tile, registers, spilled, compiled.metadata.shared
        )
        found[kernel] = None

    JITFunction.run = compile_only
    # Of points that no kernel wrote.
    vars(torch)["_assert_async"] = lambda *args: None
    # As models hand them over: heads beside each other in memory.
    q, k, v = (
        torch.zeros(1, 1024, heads, head_dim, dtype=getattr(torch, dtype)).transpose(1, 2)
        for heads in (32, 8, 8)
    )
    for text in PATTERNS:
        spans = Spans((1024,), (0,))
        backend.attend_with_lse(parse_pattern(text), q, k, v, layer=0, spans=spans, scale=0.1)
    return list(found)


def machine_code_needs(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills: of its stack and of local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as code:
        code.write(cubin)
        code.flush()
        report = subprocess.run(
            [tool, "-res-usage", code.name], capture_output=True, text=True, check=True
        ).stdout
    needs = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return int(needs["REG"]), int(needs["STACK"]) + int(needs["LOCAL"])
