"""What a timed call holds: its own draws, its share of plans, and a baseline of the same pass."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.benchmark.attention import candidates, measure
from sa_patch.benchmark.attention.record import AttentionBench, paired_ratios, read_bench
from sa_patch.benchmark.attention.run import run_bench
from sa_patch.benchmark.clock import Call, Clock
from sa_patch.benchmark.record import TIMED
from sa_patch.kernels import reference
from sa_patch.kernels.triton import tiles
from sa_patch.patterns import Pattern, seed_of
from sa_patch.patterns.permutation import permutation_slots
from tests.benchmark.attention.builder import cells_of, register, run, tiny


def gone_on(out: Path, **given: Any) -> AttentionBench:
    return run_bench(
        tiny(out, methods="swa", **given),
        lambda line: None,
        command=["bench"],
        json_only=True,
        small_ceilings=True,
        resumed=read_bench(out / "attention.json"),
    ).bench


def test_a_run_that_goes_on_times_the_baseline_anew(tmp_path: Path) -> None:
    run(tmp_path, methods="swa", backends="banded")
    bench = gone_on(tmp_path, backends=("banded", "reference"))
    for n in (32, 64):
        base, first, second = bench.where(n=n)
        assert (base.label, first.backend, second.backend) == ("SDPA full", "banded", "reference")
        assert base.passes == [0] * 4 + [1] * 4 and len(base.samples_ms) == 8
        assert (first.passes, second.passes) == ([0] * 4, [1] * 4)
        assert len(paired_ratios(base, second)) == 4
    again = gone_on(tmp_path, backends=("banded", "reference"))
    assert [cell.samples_ms for cell in again.cells] == [cell.samples_ms for cell in bench.cells]


def test_a_baseline_that_fails_later_keeps_its_earlier_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, n=(32,), methods="swa", backends="banded")

    def fail(*args: Any, **rest: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(candidates, "scaled_dot_product_attention", fail)
    bench = gone_on(tmp_path, n=(32,), backends=("banded", "reference"))
    base, _, second = bench.cells
    assert (base.status, base.passes, second.status) == (TIMED, [0] * 4, TIMED)
    rates = bench.rates(second)
    assert rates is not None and rates.speedup is None


def test_no_backend_profits_from_the_draws_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def backend(name: str) -> Any:
        def attend(pattern: Pattern, *args: Any, layer: int, **rest: Any) -> Tensor:
            before = permutation_cache().cache_info().misses
            permutation_slots(32, 0, layer)
            drawn[name] += permutation_cache().cache_info().misses - before
            calls[name] += 1
            return reference.attend(pattern, *args, layer=layer, **rest)

        return attend

    for name in ("mine", "yours"):
        register(monkeypatch, backend(name), name)
    run(tmp_path, n=(32,), methods="sa", backends=("mine", "yours"))
    assert drawn == calls and drawn["mine"] == drawn["yours"] > 4


def permutation_cache() -> Any:
    from sa_patch.patterns import permutation

    return permutation._draw_cached


@pytest.mark.parametrize("together", [12, 1])
def test_a_layers_share_of_plans_made_together_is_in_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """A call takes 3 ms and a plan of some layers 24 ms, by a clock that counts."""
    now = [0.0]

    def plan() -> tuple[Tensor, ...]:
        now[0] += 24
        return (torch.zeros(1),)

    def attend(pattern: Pattern, *args: Any, layer: int, **rest: Any) -> Tensor:
        if seed_of(pattern) is not None:
            tiles.PLANS.get((pattern.name, layer // together), plan)
        now[0] += 3
        return reference.attend(pattern, *args, layer=layer, **rest)

    def milliseconds(clock: Clock, call: Call) -> float:
        before = now[0]
        call()
        return now[0] - before or 1.0

    register(monkeypatch, attend, "triton")
    # Each plan makes room for the next.
    monkeypatch.setattr(tiles.PLANS, "limit", 4)
    monkeypatch.setattr(measure, "LAYERS", together)
    monkeypatch.setattr(candidates, "refusal", lambda *args, **rest: "")
    monkeypatch.setattr(Clock, "milliseconds", milliseconds)
    outcome = run(tmp_path, n=(32,), methods="sa,psa,swa", backends=("triton", "reference"))
    *drawn, window = cells_of(outcome, "triton")
    for cell in drawn:
        assert (cell.plan_ms, cell.median_ms) == (24 / together, 3 + 24 / together)
        assert set(cell.samples_ms) == {3.0}
    assert (window.method, window.plan_ms, window.median_ms) == ("swa", None, 3.0)
    assert cells_of(outcome, "reference")[0].plan_ms is None
    monkeypatch.setattr(measure, "PLANNING_SHARE", 0.0)
    late = run(tmp_path, n=(32,), methods="sa", backends="triton")
    assert cells_of(late, "triton")[0].plan_ms is None
