"""What kernels remember between calls of the same lengths, to be forgotten at will."""

from __future__ import annotations

import sys

from sa_patch.kernels.triton import tiles as triton_plans
from sa_patch.patterns.permutation import forget_permutations


def forget_plans() -> None:
    """Forget permutations, rings and the plans made from them.

    The next call pays for them as the first of its length does, which is what a benchmark of
    prompts has to time: real prompts rarely have the length of the one before.
    """
    forget_permutations()
    triton_plans.PLANS.clear()
    # Importing the module loads torch's compiler, which takes seconds; unloaded it holds no plans.
    flex_tables = sys.modules.get("sa_patch.kernels.flex.tables")
    if flex_tables is not None:
        flex_tables.plans.clear()
