"""What the Triton backend refuses, and what it remembers between calls."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sa_patch.benchmark.tuning import tune
from sa_patch.errors import UserError
from sa_patch.kernels import choose_backend
from sa_patch.kernels.tensor_cache import TensorCache
from sa_patch.kernels.triton import backend as triton_backend
from sa_patch.kernels.triton import tiles as triton_plans
from sa_patch.kernels.triton.launch_table import packed_heads, padded_head_dim
from sa_patch.kernels.triton.parts import NOTHING, LocalWindow
from sa_patch.kernels.triton.tiles import Row, band_table
from sa_patch.patterns import SA, SWA, Full, MoBA
from tests.kernels.triton.test_triton import run
from tests.laws.strategies import make_case

pytest.importorskip("triton")

from sa_patch.kernels.triton.rings.plan import RingPlan, ring_plan, ring_table

CPU = torch.device("cpu")


def reason(pattern: object, q: torch.Tensor, k: torch.Tensor | None = None) -> str:
    able, why = triton_backend.supports(pattern, q, q if k is None else k)  # type: ignore[arg-type]
    assert able is not bool(why)
    return why


def test_what_is_served_and_what_is_refused() -> None:
    q = torch.zeros(1, 2, 16, 8)
    for pattern in (Full(), SWA(4), SA(3), MoBA(4)):
        assert reason(pattern, q) == ""
        for dtype in (torch.float16, torch.bfloat16):
            assert reason(pattern, q.to(dtype)) == ""
        assert "float64" in reason(pattern, q.double())
        assert "head_dim is 257" in reason(pattern, torch.zeros(1, 1, 4, 257))
        assert "device" not in reason(pattern, q) and "meta" in reason(pattern, q.to("meta"))

    class Foreign:
        name = "foreign"

    assert "no rule" in reason(Foreign(), q)


def test_gradients_are_refused_only_where_they_are_recorded() -> None:
    q = torch.zeros(1, 2, 16, 8, requires_grad=True)
    assert "banded" in reason(SA(3), q)
    assert "banded" in reason(SA(3), q.detach(), q)
    with torch.no_grad():
        assert reason(SA(3), q) == ""
    with pytest.raises(UserError, match="banded"):
        choose_backend(SA(3), q, q, "triton")


def test_cached_keys_are_refused_by_stochastic_attention_alone() -> None:
    q, k = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 16, 8)
    assert "whole sequences" in reason(SA(3), q, k)
    for pattern in (Full(), SWA(4), SA(9), MoBA(4)):
        assert reason(pattern, q, k) == ""


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 16, 8)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in reason(SA(3), q)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason(SA(3), q) == ""
    run(make_case(seq_len=4), SWA(2))
    monkeypatch.setattr("sa_patch.kernels.triton.softmax.INTERPRETED", False)
    assert "before the start" in reason(SA(3), q)


def test_without_triton_the_reason_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_backend._no_triton.cache_clear()
    try:
        assert "not installed" in reason(SA(3), torch.zeros(1, 2, 16, 8))
    finally:
        monkeypatch.undo()
        triton_backend._no_triton.cache_clear()


@pytest.mark.parametrize(
    "group, block_m, pack",
    [(1, 64, 1), (4, 128, 4), (3, 16, 3), (5, 16, 1), (6, 16, 3), (71, 128, 1)],
)
def test_heads_that_share_a_tile_divide_the_group(group: int, block_m: int, pack: int) -> None:
    assert packed_heads(group, block_m) == pack


def test_head_dims_are_padded_to_what_a_product_takes() -> None:
    assert [padded_head_dim(d) for d in (1, 16, 60, 64, 96, 129)] == [16, 16, 64, 64, 128, 256]


def test_the_tables_hold_every_query_once() -> None:
    rows = (Row(0, 0, 10), Row(2, 3, 7), Row(3, 0, 0))
    table = band_table(rows, 10, 4, CPU, 0).tolist()
    assert sorted(table) == [[0, 0, 0, 10, 2], [0, 4, 0, 10, 2], [0, 8, 0, 10, 2], [2, 0, 3, 7, 1]]
    ends = [first + start for _, first, start, _, _ in table]
    assert ends == sorted(ends, reverse=True), "those that may see most keys start first"
    rows = (Row(1, 0, 9), Row(0, 0, 5), Row(4, 0, 9))
    blocks = ring_table(SA(2), rows, 9, 4, 2, CPU, 0).tolist()
    # The plan of length 5 comes first: 2 draws of 2 blocks; then that of length 9.
    assert [row[:2] for row in blocks] == [
        [1, 4],
        [1, 5],
        [1, 6],
        [0, 0],
        [0, 1],
        [4, 4],
        [4, 5],
        [4, 6],
    ]
    assert [row[2] for row in blocks] == [3, 3, 3, 2, 2, 3, 3, 3]
    assert [row[4] for row in blocks] == [-1, 3, 7, -1, 3, -1, 3, 7]
    assert [row[6] for row in blocks] == [1, 1, 1, 0, 0, 1, 1, 1]


def test_plans_are_remembered_by_what_determines_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plans, "PLANS", TensorCache(1 << 22))
    rows, five = (Row(0, 0, 50),), SA(5)

    def plan(
        pattern: SA = five,
        layer: int = 0,
        heads: int = 4,
        block: int = 16,
        near: LocalWindow = NOTHING,
    ) -> RingPlan:
        return ring_plan(pattern, rows, 50, near, layer=layer, heads=heads, block=block, device=CPU)

    def where(plan: RingPlan) -> int:
        return plan.queries.data_ptr()

    first = plan()
    assert where(plan()) == where(first) == where(plan(heads=8))
    # Layers are planned together.
    neighbour = plan(layer=1)
    assert len(triton_plans.PLANS) == 1 and where(neighbour) != where(first)
    others = [plan(layer=1000), plan(SA(5, seed=1)), plan(SA(6)), plan(block=8)]
    others += [
        plan(near=LocalWindow(sinks=2)),
        plan(SA(5, circular=False)),
        plan(SA(5, per_head=True)),
    ]
    others.append(plan(SA(5, per_head=True), heads=8))
    assert all(where(other) != where(first) for other in others)
    assert len(triton_plans.PLANS) == 9
    assert others[-1].queries.shape[0] == 2 * others[-2].queries.shape[0]


def test_one_plan_beyond_the_limit_is_used_but_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plans, "PLANS", TensorCache(1))
    case = make_case(seq_len=30)
    difference = run(case, SA(4))[0] - case.run(SA(4), "reference")
    assert difference.abs().max() <= 1e-5
    assert len(triton_plans.PLANS) == 0 and triton_plans.PLANS.bytes == 0


def test_tuning_needs_a_gpu() -> None:
    q = torch.zeros(1, 2, 16, 8)
    with pytest.raises(UserError, match="CUDA"):
        tune(SWA(4), q, q, q)
