"""A benchmark that is interrupted or out of time keeps what it measured.

Seen red when an interrupt lost the lengths before it, and half-timed cells counted as timed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sa_patch.benchmark.attention.record import read_bench
from sa_patch.benchmark.record import SKIPPED, TIMED
from sa_patch.kernels import reference
from sa_patch.patterns import Pattern
from tests.benchmark.attention.builder import cells_of, register, run
from tests.pictures import DRAWN, coloured


def stop_at(calls: int, length: int) -> Callable[..., Tensor]:
    """A backend that is interrupted at its given call of this length."""
    seen = [0]

    def attend(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        if q.shape[2] == length:
            seen[0] += 1
            if seen[0] == calls:
                raise KeyboardInterrupt
        return reference.attend(pattern, q, k, v, **rest)

    return attend


def test_an_interrupt_keeps_the_lengths_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, stop_at(1, 64))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, all_files=True, methods="swa", backends=("mine", "banded"))
    kept = read_bench(tmp_path / "attention.json")
    assert not kept.complete and kept.provenance["ended"]
    assert all(cell.status == TIMED for cell in kept.where(n=32))
    assert [cell.status for cell in kept.where(n=64)] == [SKIPPED] * 3
    assert all("interrupted" in cell.reason for cell in kept.where(n=64))
    assert "This run was interrupted" in (tmp_path / "attention.md").read_text()
    assert coloured(tmp_path / "attention.png") > DRAWN


def test_a_cell_interrupted_while_it_is_timed_counts_from_three_samples_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At n = 64: the check, the call that learns its time, then the repetitions.
    for calls, status in ((2 + 3, SKIPPED), (2 + 4, TIMED)):
        register(monkeypatch, stop_at(calls, 64))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, methods="swa", backends="mine", repeats=8)
        cell = next(c for c in read_bench(tmp_path / "attention.json").where(n=64) if not c.rival)
        assert (cell.status, len(cell.samples_ms)) == (status, calls - 3)
        assert (cell.median_ms is None) == (status == SKIPPED)


def test_a_spent_budget_skips_with_a_reason(tmp_path: Path) -> None:
    outcome = run(tmp_path, all_files=True, budget=1e-9, methods="swa")
    assert {cell.status for cell in outcome.bench.cells} == {SKIPPED}
    assert all("time budget was spent" in cell.reason for cell in outcome.bench.cells)
    assert outcome.exit_status == 0 and len(outcome.files) == 2, "there is nothing to draw"


def test_a_long_first_length_is_tried_on_a_short_one(tmp_path: Path) -> None:
    outcome = run(tmp_path, n=(4096,), budget=2.0, methods="swa", heads=2, repeats=3)
    mask = cells_of(outcome, "reference")[0]
    assert mask.status in (TIMED, SKIPPED)
    assert outcome.bench.where(n=1024) == [], "the short call is no result"
