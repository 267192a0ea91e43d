"""FlashAttention-4 compiled for a Hopper card that is not there; runs where it is installed."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from sa_patch.benchmark.compilation import flash as compilation
from sa_patch.kernels.flash.attention4 import blocks_for
from sa_patch.kernels.flash.walk import attend_plans
from sa_patch.patterns import parse_pattern
from tests.thorough import unless_thorough

INSTALLED = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")

# Windows, seeds, lengths, rows of a batch: numbers alone.
ALIKE = {
    "ring": [
        ("sa:16,seed=0", 300, 1),
        ("sa:100,seed=7", 1000, 1),
        ("sa:300,seed=1,circular=false", 1900, 1),
        ("psa:70", 515, 1),
    ],
    "pages": [
        ("block_topk:16,2,shared=32", 300, 1),
        ("block_topk:16,1,4,shared=32", 900, 2),
        ("sinks:3+swa:40+block_topk:16,4,shared=32", 500, 1),
    ],
    "local": [("sinks:1+swa:9", 300, 1), ("sinks:64+swa:500", 1111, 1), ("sinks:4", 700, 1)],
}


def compiled(kinds: Sequence[str]) -> list[int]:
    """How many kernels there are after the calls of each kind."""
    compilation.prepare((9, 0))
    from flash_attn.cute.interface import _flash_attn_fwd

    counts = []
    for kind in kinds:
        for text, n, batch in ALIKE[kind]:
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
        counts.append(len(_flash_attn_fwd.compile_cache.cache))
    return counts


@pytest.mark.skipif(not INSTALLED, reason="flash-attn-4 is not installed")
def test_numbers_are_no_constants_of_a_kernel() -> None:
    # Each takes 5 s to compile.
    kinds = unless_thorough(["ring", "pages"], list(ALIKE))
    # The card is read from the environment on import.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(compiled, kinds).result() == [1, 2, 3][: len(kinds)]
