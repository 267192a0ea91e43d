"""What a layer costs on a GPU beside its kernels' work: launches, and waits for the device.

Every operation counts as a launch, though some only set memory aside. Seen red when each layer was
planned alone, when permutations were hashed in torch, and when each level of a tree of blocks was
searched there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sa_patch.kernels import BACKENDS, expect_layers, forget_plans
from sa_patch.kernels.backend import Spans
from sa_patch.kernels.triton import parts, tiles
from sa_patch.kernels.triton.parts import NOTHING
from sa_patch.kernels.triton.tiles import Row
from sa_patch.patterns import PSA, SA, parse_pattern

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from sa_patch.kernels.triton.block_choice import launch
from sa_patch.kernels.triton.rings.plan import ring_plan, ring_table

LAYERS = 32
# What a GPU needs beyond what a CPU is seen to do: two small tables are copied from pinned memory.
COPIES = 4
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


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched, none of which runs: nor does what the interpreter does beside."""
    launched: list[str] = []
    generator = torch.Generator().manual_seed(0)

    def count(executor: Any, *args: Any, **options: Any) -> None:
        launched.append(executor.fn.__name__)
        if launched[-1] == "hash_kernel":
            # Bands are only as wide as random points need.
            with _disable_current_modes():
                args[0].random_(2**62, generator=generator)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    return launched


@pytest.fixture
def nothing_known() -> None:
    forget_plans()
    for table in (tiles.band_table, tiles.row_table, parts._lows, launch._eligible, ring_table):
        table.cache_clear()


def launches_of_a_prompt(text: str, n: int, kernels: list[str]) -> int:
    """Operations and kernels of all layers together, which wait for nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, heads, 8, generator=generator).to(torch.bfloat16).transpose(1, 2)
        for heads in (4, 2, 2)
    )
    pattern = parse_pattern(text)
    kernels.clear()
    with torch.no_grad(), Launches() as seen:
        for layer in range(LAYERS):
            BACKENDS["triton"].attend(
                pattern, q, k, v, layer=layer, spans=Spans((n,), (0,)), scale=1.0
            )
    assert seen.waits == 0
    return seen.launches + len(kernels)


@pytest.mark.parametrize(
    "text, n, most",
    [
        ("sa:256", 600, 12),
        ("sa:256", 8192, 12),
        ("sa:256,circular=false", 600, 12),
        ("psa:138", 8192, 112),
    ],
)
@pytest.mark.usefixtures("nothing_known")
def test_a_new_length_is_planned_with_few_launches_for_all_layers(
    text: str, n: int, most: int, kernels: list[str]
) -> None:
    new = launches_of_a_prompt(text, n, kernels)
    known = launches_of_a_prompt(text, n, kernels)
    assert known <= 4 * LAYERS
    assert new - known + COPIES <= most


@pytest.mark.parametrize("pattern, most", [(SA(256), 36), (PSA(256), 210)], ids=["sa", "psa"])
@pytest.mark.usefixtures("nothing_known")
def test_rows_of_two_new_lengths_are_planned_with_few_launches(
    pattern: SA | PSA, most: int, kernels: list[str]
) -> None:
    rows = (Row(0, 0, 700), Row(1, 0, 1024))

    def launches() -> int:
        kernels.clear()
        with Launches() as seen:
            for layer in range(LAYERS):
                ring_plan(
                    *(pattern, rows, 1024, NOTHING),
                    layer=layer,
                    heads=32,
                    block=128,
                    device=torch.device("cpu"),
                )
        assert seen.waits == 0
        return seen.launches + len(kernels)

    assert launches() <= most
    assert launches() == 0, "known lengths cost nothing"


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
@pytest.mark.usefixtures("nothing_known")
def test_a_layer_of_an_unpadded_prefill_takes_few_launches(
    text: str, n: int, kernels: list[str]
) -> None:
    """With all that a new length needs."""
    assert launches_of_a_prompt(text, n, kernels) <= 20 * LAYERS
