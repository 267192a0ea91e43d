"""The Triton kernels compile for real GPUs, without one, and their committed launches do not spill.

A child process, free of the interpreter, goes through the real launches with a driver that only
names a target; each kernel is compiled down to machine code, and the bundled `cuobjdump`
reports what it needs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED_MEMORY = {90: 227 << 10, 80: 163 << 10}  # bytes that one program may have
CASES = [
    ("bfloat16", 64, 90),
    ("bfloat16", 128, 90),
    ("float32", 64, 90),
    ("float16", 128, 80),
]


# Compile-time choices that make another kernel of the same source.
FLAGS = ["CHOSEN", "JOIN", "LIMITED", "RINGS", "SPANS"]


class NamedTarget:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def machine_code_needs(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: where registers that ran out are spilled."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "kernel.cubin")
        code.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run(
            [tool, "-res-usage", code], capture_output=True, text=True, check=True
        ).stdout
    needs = {name: re.search(rf"{name}:(\d+)", report) for name in ("REG", "STACK", "LOCAL")}
    return {name: int(found[1]) for name, found in needs.items() if found}


def compile_all(dtype: str, head_dim: int, capability: int) -> list[dict[str, Any]]:
    """Every kernel of every pattern at one shape: name, options and what it needs."""
    import triton
    from triton.runtime.jit import JITFunction

    from sa_patch.kernels.backend import Spans
    from sa_patch.kernels.triton import backend as triton_backend
    from sa_patch.kernels.triton import launch_table
    from sa_patch.patterns import SA, SWA, MoBA, parse_pattern

    triton.runtime.driver.set_active(NamedTarget(capability))
    part = "hopper" if capability >= 90 else "ampere"
    vars(launch_table)["device_class"] = lambda device, interpreted: part
    run, records = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        needs = {**machine_code_needs(kernel.asm["cubin"]), "shared": kernel.metadata.shared}
        record = {"kernel": self.__name__, "warps": kwargs["num_warps"]}
        flags = [name for name in FLAGS if kwargs.get(name)]
        tile = f"{kwargs['BLOCK_M']}x{kwargs['BLOCK_N']} stages={kwargs['num_stages']}"
        records.append({**record, "flags": flags, "tile": tile, **needs})

    JITFunction.run = compile_only
    # As models hand them over: heads beside each other in memory.
    q, k, v = (
        torch.zeros(1, 1024, heads, head_dim, dtype=getattr(torch, dtype)).transpose(1, 2)
        for heads in (32, 8, 8)
    )
    union = "sinks:4+sa:64,per_head=true+psa:64+block_topk:16,4+block_topk:4,8,local=4"
    for pattern in (SWA(256), SA(256), MoBA(256, 3), parse_pattern(union)):
        triton_backend.attend_with_lse(
            pattern, q, k, v, layer=0, spans=Spans((1024,), (0,)), scale=0.1
        )
    return records


# Bytes: the fastest launch of sliding windows that was measured spills a few registers.
SPILLED = {("local_window_kernel", "128x32 stages=3", 4): 128}


def fits(record: dict[str, Any], capability: int) -> bool:
    launch = (record["kernel"], record["tile"], record["warps"])
    spilled = SPILLED.get(launch, 0)
    return (
        record["STACK"] <= spilled
        and record["LOCAL"] == 0
        and record["shared"] <= SHARED_MEMORY[capability]
    )


@pytest.mark.parametrize("dtype, head_dim, capability", CASES)
def test_committed_launches_compile_and_do_not_spill(
    dtype: str, head_dim: int, capability: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.kernels.triton.test_compile",
            dtype,
            str(head_dim),
            str(capability),
        ],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    records = json.loads(child.stdout.splitlines()[-1])
    kinds = {(record["kernel"], *record["flags"]) for record in records}
    assert kinds == {
        ("local_window_kernel",),
        ("local_window_kernel", "CHOSEN"),
        ("local_window_kernel", "CHOSEN", "JOIN"),
        ("ring_kernel",),
        ("ring_kernel", "JOIN"),
        ("ring_kernel", "JOIN", "RINGS"),
        ("choose_kernel",),
        ("chosen_kernel",),
        ("chosen_kernel", "LIMITED", "RINGS"),
        ("small_blocks_kernel", "JOIN", "RINGS", "SPANS"),
    }
    assert all(fits(record, capability) for record in records), records


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
