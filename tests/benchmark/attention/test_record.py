"""What a benchmark's record says, and its tables and figure, against figures worked out by hand.

Seen red when the speed-up was upside down, bytes and FLOPs were swapped in the floor, cells without
a time came first, and a panel drew the cells of another window.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa_patch.benchmark.attention import figure
from sa_patch.benchmark.attention.record import (
    AttentionBench,
    AttentionCell,
    paired_ratios,
    read_bench,
)
from sa_patch.benchmark.attention.tables import markdown, ratio_table, summary_rows
from sa_patch.benchmark.clock import Ceilings, better
from sa_patch.benchmark.record import SKIPPED, TIMED, WRONG, write_results
from sa_patch.benchmark.tables import number, ordered
from sa_patch.errors import UserError


@pytest.mark.parametrize(
    "content, says",
    [("{", "cannot read"), ("[]", "is no"), ('{"kind": "x"}', "is no"), (None, "cannot read")],
)
def test_a_torn_or_foreign_record_is_refused(
    tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "attention.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says):
        read_bench(path)


RESULTS = Path(__file__).resolve().parents[3] / "eval" / "results"
PUBLISHED = sorted(
    [*RESULTS.glob("attention/*/attention.json"), *RESULTS.glob("gpu/*/*/attention.json")]
)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_runs_are_read_and_written_as_they_are(path: Path) -> None:
    bench = read_bench(path)
    assert json.loads(json.dumps(bench.content())) == json.loads(path.read_text())
    assert markdown(bench) == path.with_suffix(".md").read_text()


def made(
    n: int, label: str, backend: str, ms: Sequence[float], window: int | None = None, **rest: Any
) -> AttentionCell:
    method, rival = label.partition(":")[0], rest.pop("rival", False)
    cell = AttentionCell(
        n=n, label=label, method=method, backend=backend, rival=rival, window=window, status=TIMED
    )
    cell.samples_ms, cell.flops, cell.io_bytes = list(ms), 2e9, 10**6
    cell.started_s = [float(index) for index in range(len(ms))]
    cell.passes = [0] * len(ms)
    return dataclasses.replace(cell, **rest)


CEILINGS = Ceilings(100.0, 10.0, 1 << 20, 512, (1.0,), (1.0,))


def bench_of(*cells: AttentionCell) -> AttentionBench:
    hardware = {"cpu": "a processor", "gpus": [], "torch_threads": 1}
    provenance = {"hardware": hardware, "versions": {"torch": "2"}, "git": None, "started": "now"}
    options = {
        **{"heads": 4, "kv_heads": 2, "head_dim": 8, "batch": 1, "dtype": "float32"},
        **{"device": "cpu", "threads": None},
    }
    return AttentionBench(provenance, options, list(cells), True, CEILINGS)


def test_figures_that_follow_from_the_samples() -> None:
    base = made(64, "SDPA full", "torch", [9, 8, 10, 8.5, 9.5], rival=True)
    cell = made(64, "swa:window=8", "banded", [4, 1, 2, 3, 10], window=8, extra_bytes=500_000)
    bench = bench_of(base, cell)
    assert cell.median_ms == 3 and cell.quartiles_ms == (2, 4) and cell.memory_ratio == 1.5
    found = bench.rates(cell)
    assert found is not None
    # 2e9 FLOPs in 3 ms, 1e6 bytes in 3 ms; at 10 TFLOP/s the floor is 0.2 ms, at 100 GB/s 0.01.
    # 9/4, 8/1, 10/2, 8.5/3, 9.5/10, in order 0.95, 2.25, 2.83, 5, 8.
    assert found.speedup == pytest.approx(8.5 / 3)
    assert found.speedup_quartiles == pytest.approx((2.25, 5))
    assert found.tflop_per_s == pytest.approx(2 / 3)
    assert found.matmul_share == pytest.approx(1 / 15)
    assert found.gb_per_s == pytest.approx(1 / 3) and found.copy_share == pytest.approx(1 / 300)
    assert found.floor_ms == pytest.approx(0.2) and found.gap == pytest.approx(15)
    few = made(64, "x", "banded", [5, 1, 3])
    assert few.quartiles_ms == (1, 5), "three samples have no quartiles"
    alone = bench_of(cell).rates(cell)
    assert alone is not None and alone.speedup is None


def test_ratios_pair_calls_that_were_near_in_time() -> None:
    """The machine is twice as slow from 10 s on; each side was called more often in one half."""
    base = made(64, "SDPA full", "torch", [8, 16, 16, 16], rival=True, started_s=[1, 11, 13, 15])
    cell = made(64, "full", "banded", [2, 2, 2, 4], started_s=[0.5, 2.0, 3.0, 12.2])
    assert paired_ratios(base, cell) == [4, 4, 4, 4]
    assert statistics.median(base.samples_ms) / statistics.median(cell.samples_ms) == 8


def test_ratios_are_of_calls_of_one_pass() -> None:
    """The machine is twice as slow when the run goes on, and the clock of a pass begins at 0."""
    both: dict[str, Any] = {"started_s": [0, 1, 2, 0, 1, 2], "passes": [0, 0, 0, 1, 1, 1]}
    base = made(64, "SDPA full", "torch", [8, 8, 8, 16, 16, 16], rival=True, **both)
    later = made(64, "full", "flex", [4, 4, 4], started_s=[0.9, 1, 1.1], passes=[1, 1, 1])
    alone = dataclasses.replace(later, passes=[2, 2, 2])
    bench = bench_of(base, later, alone)
    assert paired_ratios(base, later) == [4, 4, 4] and paired_ratios(base, alone) == []
    base.extend(made(64, "SDPA full", "torch", [1], status=SKIPPED, passes=[2]))
    rates = bench.rates(alone)
    assert rates is not None and rates.speedup is None and rates.speedup_quartiles is None
    assert "| full | flex | 4.00 |" in markdown(bench)
    own = [made(64, "full", "reference", [8]), made(64, "full", "flex", [4], passes=[1])]
    assert ratio_table(bench_of(*own)).splitlines()[-1] == "| 64 | full | - |"


def test_a_layers_share_of_planning_is_in_every_figure() -> None:
    base = made(64, "SDPA full", "torch", [12] * 4, rival=True)
    cell = made(64, "sa:window=8,seed=0", "triton", [2, 2, 2, 3], plan_ms=1.0)
    assert cell.median_ms == 3 and cell.quartiles_ms == (3, 3.25)
    found = bench_of(base, cell).rates(cell)
    assert found is not None and found.speedup == 4 and found.tflop_per_s == pytest.approx(2 / 3)


def test_passes_and_planning_survive_writing_and_reading(tmp_path: Path) -> None:
    cells = [
        made(64, "full", "banded", [4, 4], passes=[0, 1]),
        made(64, "full", "triton", [1], plan_ms=0.5),
        made(64, "full", "flex", [2]),
    ]
    write_results(tmp_path / "bench", bench_of(*cells).content())
    assert read_bench(tmp_path / "bench.json").cells == cells


def test_the_better_of_two_looks_at_the_ceilings() -> None:
    first = Ceilings(100.0, 10.0, 1, 512, (1.0,), (2.0,))
    second = Ceilings(90.0, 11.0, 1, 1024, (3.0,), (4.0,))
    best = Ceilings(100.0, 11.0, 1, 1024, (1.0,), (4.0,))
    assert better(first, second) == better(second, first) == best


def test_tables_are_sorted_and_say_what_was_not_timed() -> None:
    skipped = made(
        64, "moba:block_size=4,topk=2", "banded", [1], status=SKIPPED, reason="too | slow"
    )
    slow, quick = made(64, "full", "banded", [7]), made(64, "swa:window=8", "banded", [2], window=8)
    base = made(64, "SDPA full", "torch", [8], rival=True)
    assert ordered([skipped, slow, quick]) == [quick, slow, skipped]
    bench = bench_of(base, skipped, slow, quick)
    rows = [line for line in markdown(bench).splitlines() if "banded" in line or "torch |" in line]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        *("swa:window=8", "full", "SDPA full", "moba:block_size=4,topk=2")
    ]
    assert "skipped: too \\| slow" in rows[-1] and "| 4.00 (4.00 to 4.00) |" in rows[0]
    assert summary_rows(bench)[0] == ["swa:window=8", "banded", "2.00 4.00x"]


def test_each_backends_time_over_that_of_reference() -> None:
    cells = [
        made(64, "swa:window=8", "reference", [4]),
        made(64, "swa:window=8", "banded", [6]),
        made(64, "full", "banded", [6]),
        made(64, "SDPA full", "torch", [8], rival=True),
    ]
    lines = ratio_table(bench_of(*cells)).splitlines()
    assert lines[0] == "| n | pattern | banded / reference |"
    assert lines[2:] == ["| 64 | swa:window=8 | 1.50 |", "| 64 | full | - |"]


@pytest.mark.parametrize(
    "value, text",
    [(0.01234, "0.0123"), (4.5678, "4.57"), (789.4, "789"), (12345.6, "12,346"), (0.0, "0")],
)
def test_numbers_have_three_figures(value: float, text: str) -> None:
    assert number(value) == text


def test_each_window_has_a_panel_with_its_own_lines() -> None:
    cells = [
        made(n, label, backend, [n * 0.1], window, rival=backend == "torch")
        for n in (32, 64)
        for label, backend, window in (
            ("SDPA full", "torch", None),
            ("swa:window=8", "banded", 8),
            ("swa:window=16", "banded", 16),
            ("sa:window=16,seed=0", "reference", 16),
        )
    ]
    cells.append(made(64, "moba:block_size=8,topk=2", "banded", [], 16, status=WRONG))
    chosen = figure.panels(bench_of(*cells))
    assert {w: {one.label for one in drawn} for w, drawn in chosen.items()} == {
        8: {"SDPA full", "swa:window=8, banded"},
        16: {"SDPA full", "swa:window=16, banded", "sa:window=16,seed=0, reference"},
    }
    drawn = figure.draw(bench_of(*cells))
    for axes, lines in zip(drawn.axes, chosen.values(), strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert len(axes.get_lines()) == len(lines)
        looks = {(one.get_color(), one.get_marker()) for one in axes.get_lines()}
        assert len(looks) == len(lines)
        assert np.asarray(axes.get_lines()[0].get_ydata()).tolist() == pytest.approx([3.2, 6.4])
        box = axes.get_legend()
        assert box is not None
        legend = box.get_window_extent()
        assert legend.x0 > axes.get_window_extent().x1 and legend.x1 <= drawn.bbox.x1
