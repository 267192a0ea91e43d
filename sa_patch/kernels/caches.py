"""What kernels remember between calls of the same lengths, to be forgotten at will."""

from __future__ import annotations

from sa_patch.kernels.plans.plan import PLANS as BLOCK_PLANS
from sa_patch.kernels.triton import tiles as triton_plans
from sa_patch.patterns.permutation import forget_permutations


def forget_plans() -> None:
    """Forget permutations, rings and the plans made from them.

    The next call pays for them as the first of its length does, which is what a benchmark of
    prompts has to time: real prompts rarely have the length of the one before.
    """
    forget_permutations()
    triton_plans.PLANS.clear()
    BLOCK_PLANS.clear()


def expect_layers(count: int) -> None:
    """Plan the rings of at least so many layers at once, all of a model that is about to run.

    Fewer or more cost time and change no result.
    """
    triton_plans.expect_layers(count)
