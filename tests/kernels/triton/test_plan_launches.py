"""What planning costs on a GPU: operations that would be launches, and waits for the device.

Seen red when each layer was planned alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sa_patch.kernels import forget_plans
from sa_patch.kernels.triton.parts import NOTHING
from sa_patch.kernels.triton.ring_tiles import ring_plan
from sa_patch.kernels.triton.tiles import Row
from sa_patch.patterns import PSA, SA

LAYERS = 32
# Operations that only look at memory in another way.
VIEWS = (
    *("view", "slice", "select", "expand", "unsqueeze", "alias", "as_strided", "transpose"),
    *("aten::t", "unflatten", "detach", "permute", "split", "lift_fresh"),
)
WAITS = ("_local_scalar_dense", "nonzero", "_to_cpu")


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not any(view in func.name() for view in VIEWS)
        self.waits += any(wait in func.name() for wait in WAITS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "pattern, most, waits", [(SA(256), 6, 0), (PSA(256), 20, 1)], ids=["sa", "psa"]
)
@pytest.mark.parametrize("lengths", [(8192,), (700, 1024)], ids=str)
def test_a_new_length_is_planned_with_few_launches(
    pattern: SA | PSA, most: int, waits: int, lengths: tuple[int, ...]
) -> None:
    rows = tuple(Row(batch, 0, length) for batch, length in enumerate(lengths))
    forget_plans()

    def plan_all() -> None:
        for layer in range(LAYERS):
            ring_plan(
                *(pattern, rows, max(lengths), NOTHING),
                layer=layer,
                heads=32,
                block=128,
                device=torch.device("cpu"),
            )

    with Launches() as first:
        plan_all()
    assert first.launches <= most * LAYERS * len(lengths)
    assert first.waits <= waits * LAYERS * len(lengths)
    # Known lengths cost nothing.
    with Launches() as again:
        plan_all()
    assert (again.launches, again.waits) == (0, 0)
