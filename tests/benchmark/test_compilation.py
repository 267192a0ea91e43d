"""The Triton kernels compile for real GPUs, without one, and their committed launches fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sa_patch.benchmark.compilation.triton import SHARED_MEMORY, CompiledKernel, compile_in_child
from sa_patch.kernels.triton.launch_table import class_of_capability

KERNELS = {
    *("local_window_kernel", "local_window_kernel chosen", "local_window_kernel chosen join"),
    *("ring_kernel", "ring_kernel join", "ring_kernel join rings"),
    *("choose_kernel", "choose_many_kernel", "chosen_kernel", "chosen_kernel limited rings"),
    "small_blocks_kernel join rings spans",
    *("shared_blocks_kernel", "shared_blocks_kernel limited", "tree_search_kernel"),
    "shared_blocks_kernel join limited rings spans",
    *("hash_kernel", "band_kernel", "limit_kernel", "limit_kernel limited"),
}
# Bytes: the fastest launch of sliding windows that was measured spills a few registers.
MAY_SPILL = {("local_window_kernel", "128 x 32, 4 warps, 3 stages"): 128}


def test_committed_launches_compile_fit_and_do_not_spill() -> None:
    """All GPUs, dtypes and head_dims: scripts/compile_kernels."""
    pytest.importorskip("triton")
    compiled = compile_in_child([((9, 0), "bfloat16", 128)])
    assert {one.kernel for one in compiled} == KERNELS
    for one in compiled:
        assert one.fits
        assert one.registers > 0
        assert one.spilled <= MAY_SPILL.get((one.kernel, one.tile), 0), one


def test_a_launch_larger_than_the_gpu_does_not_fit() -> None:
    launch = CompiledKernel((9, 0), "bfloat16", 128, "ring_kernel", "", 255, 0, 131072)
    assert launch.fits
    assert not replace(launch, capability=(8, 6)).fits


def test_every_kind_of_gpu_has_launches() -> None:
    classes = {capability: class_of_capability(capability) for capability in SHARED_MEMORY}
    assert classes == {
        **dict.fromkeys([(8, 0), (8, 6), (8, 9), (12, 0)], "ampere"),
        (9, 0): "hopper",
        (10, 0): "blackwell",
    }
