"""FlashAttention-4 compiled for a Hopper card that is not there; runs where it is installed."""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from sa_patch.benchmark.compilation import flash as compilation
from sa_patch.kernels.flash.attention4 import blocks_for
from sa_patch.kernels.flash.walk import attend_plans
from sa_patch.patterns import parse_pattern

INSTALLED = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")

# Windows, seeds, lengths, rows of a batch: numbers alone.
ALIKE = {
    "ring": [
        ("sa:16,seed=0", 300, 1),
        ("sa:100,seed=7", 1000, 1),
        ("sa:300,seed=1,circular=false", 1900, 1),
        ("psa:70", 515, 1),
    ],
    "local": [("sinks:1+swa:9", 300, 1), ("sinks:64+swa:500", 1111, 1), ("sinks:4", 700, 1)],
}


def compiled(calls: list[tuple[str, int, int]]) -> int:
    """How many kernels these patterns, lengths and batches need."""
    compilation.prepare((9, 0))
    from flash_attn.cute.interface import _flash_attn_fwd

    for text, n, batch in calls:
        q, k = (torch.zeros(batch, heads, n, 64, dtype=torch.bfloat16) for heads in (4, 2))
        attend_plans(
            parse_pattern(text),
            q,
            k,
            k,
            layer=n,
            scale=0.1,
            blocks=blocks_for(9, 64),
            kernel=compilation.compiler(),
        )
    return len(_flash_attn_fwd.compile_cache.cache)


@pytest.mark.skipif(not INSTALLED, reason="flash-attn-4 is not installed")
@pytest.mark.parametrize("kind", ALIKE)
def test_numbers_are_no_constants_of_a_kernel(kind: str) -> None:
    # The card is read from the environment on import.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(compiled, ALIKE[kind]).result() == 1
