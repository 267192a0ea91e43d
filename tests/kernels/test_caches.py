"""What kernels remember can be forgotten, and what they compute does not depend on it.

Seen red when one of the three memories was left as it was.
"""

import pytest
import torch

from sa_patch.kernels import forget_plans, sparse_attention
from sa_patch.kernels.plans import plan as block_plans
from sa_patch.kernels.triton import tiles as triton_plans
from sa_patch.patterns import SA, permutation
from tests.thorough import unless_thorough


@pytest.mark.parametrize(
    "backend", unless_thorough(["banded", "triton"], ["banded", "flex", "triton"])
)
def test_forgotten_plans_are_made_anew_and_the_same(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 64).unbind()
    before = sparse_attention(q, k, v, SA(8), backend=backend)
    held = {"flex": block_plans.PLANS, "triton": triton_plans.PLANS}
    assert permutation._draw_cached.cache_info().currsize
    assert backend == "banded" or len(held[backend])
    forget_plans()
    assert not permutation._draw_cached.cache_info().currsize
    assert all(len(memory) == memory.bytes == 0 for memory in held.values())
    assert torch.equal(sparse_attention(q, k, v, SA(8), backend=backend), before)
