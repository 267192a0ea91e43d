"""What a layer costs on a GPU beside its kernels' work: launches, and waits for the device.

Every operation counts as a launch, though some only set memory aside. Seen red when each layer was
planned alone, and when each level of a tree of blocks was searched in torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sa_patch.kernels import BACKENDS, expect_layers, forget_plans
from sa_patch.kernels.backend import Spans
from sa_patch.kernels.triton import parts, tiles
from sa_patch.kernels.triton.parts import NOTHING
from sa_patch.kernels.triton.tiles import Row
from sa_patch.patterns import PSA, SA, parse_pattern

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from sa_patch.kernels.triton.rings.plan import ring_plan, ring_table

LAYERS = 32
# Operations that only look at memory in another way.
VIEWS = (
    *("view", "slice", "select", "expand", "unsqueeze", "alias", "as_strided", "transpose"),
    *("aten::t", "unflatten", "detach", "permute", "split", "lift_fresh"),
)
WAITS = ("_local_scalar_dense", "nonzero", "_to_cpu")


@pytest.fixture(autouse=True)
def model_of_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `patch_model` leaves it; a model of few layers that is patched later changes nothing."""
    monkeypatch.setattr(tiles, "_expected_layers", tiles._LAYERS_TOGETHER)
    expect_layers(LAYERS)
    expect_layers(3)


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not any(view in func.name() for view in VIEWS)
        self.waits += any(wait in func.name() for wait in WAITS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern, most", [(SA(256), 6), (PSA(256), 9)], ids=["sa", "psa"])
@pytest.mark.parametrize("lengths", [(8192,), (700, 1024)], ids=str)
def test_a_new_length_is_planned_with_few_launches(
    pattern: SA | PSA, most: int, lengths: tuple[int, ...]
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
    assert first.waits == 0
    # Known lengths cost nothing.
    with Launches() as again:
        plan_all()
    assert (again.launches, again.waits) == (0, 0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched, none of which runs: nor does what the interpreter does beside."""
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []

    def count(executor: Any, *args: Any, **options: Any) -> None:
        launched.append(executor.fn.__name__)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    return launched


@pytest.mark.parametrize("n", [8192, 32768])
@pytest.mark.parametrize(
    "text",
    [
        "block_topk:4,50,4,16",
        "block_topk:4,50,4,16,branch=0",
        "tail:64+block_topk:4,34,4,16",
        "sinks:4+swa:70+block_topk:4,17,4,16",
        "block_topk:8,16,64,0,branch=0,shared=32,segment=128",
        "moba:256,3",
        "psa:138",
        "sinks:4+swa:138+psa:138",
        "sinks:4+swa:64+sa:64",
    ],
)
def test_a_layer_of_an_unpadded_prefill_takes_few_launches(
    text: str, n: int, kernels: list[str]
) -> None:
    """With all that a new length needs."""
    from sa_patch.kernels.triton.block_choice import launch

    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, heads, 8, generator=generator).to(torch.bfloat16).transpose(1, 2)
        for heads in (4, 2, 2)
    )
    pattern = parse_pattern(text)
    forget_plans()
    for table in (tiles.band_table, tiles.row_table, parts._lows, launch._eligible, ring_table):
        table.cache_clear()
    with torch.no_grad(), Launches() as seen:
        for layer in range(LAYERS):
            BACKENDS["triton"].attend(
                pattern, q, k, v, layer=layer, spans=Spans((n,), (0,)), scale=1.0
            )
    assert seen.launches + len(kernels) <= 20 * LAYERS
    assert seen.waits == 0
