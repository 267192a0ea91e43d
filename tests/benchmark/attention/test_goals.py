"""The GPU goal sheet: how goals are judged, the correctness grid, and the rehearsal on a CPU.

Seen red when the best length stood for the worst, a length without a time was passed over, any
FlashAttention counted as version 3, FlexAttention counted as our kernel, a wrong backend passed
the grid, and a rehearsal judged its goals.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.benchmark.attention import correctness_grid as check_module
from sa_patch.benchmark.attention import goal_sheet
from sa_patch.benchmark.attention.correctness import Verdict
from sa_patch.benchmark.attention.correctness_grid import PASSED, REFUSED, Case, check, grid
from sa_patch.benchmark.attention.goals import growth_exponent, judge_goals
from sa_patch.benchmark.attention.record import AttentionBench, AttentionCell
from sa_patch.benchmark.goals import MET, MISSED, UNMEASURED, Goal
from sa_patch.benchmark.record import FAILED, SKIPPED, TIMED, WRONG, fastest
from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS, Backend, reference
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern

SA_LABEL, MOBA_LABEL = "sa:window=256,seed=0", "moba:block_size=512,topk=3"
ROOT = Path(__file__).resolve().parents[3]


def cell(n: int, label: str, backend: str, ms: float | None, **rest: Any) -> AttentionCell:
    values: dict[str, Any] = {
        **{"method": label.partition(":")[0], "rival": False, "window": 256},
        **{"status": SKIPPED if ms is None else TIMED, "correctness": Verdict(1e-3, 1e-2, 1, 0)},
    }
    samples = [] if ms is None else [ms]
    return AttentionCell(n=n, label=label, backend=backend, samples_ms=samples, **(values | rest))


def band(n: int, ms: float, version: str = "FlashAttention-3") -> AttentionCell:
    return cell(n, "two-sided band (255, 255)", version, ms, method="band", rival=True)


def judged(*cells: AttentionCell) -> list[Goal]:
    return judge_goals(AttentionBench({}, {}, cells=list(cells)))


def test_nothing_measured_meets_nothing() -> None:
    assert [goal.status for goal in judged()] == [UNMEASURED] * 6
    assert all(goal.value is None and goal.detail for goal in judged())


def test_the_worst_length_stands_for_the_goal() -> None:
    cells = [cell(n, SA_LABEL, "triton", 1.0) for n in (2048, 4096)]
    flash, flex, *_ = judged(*cells, band(2048, 0.9), band(4096, 0.7))
    assert flash.status == MISSED and flash.value == pytest.approx(0.7)
    assert "2K 0.900 (triton over FlashAttention-3); 4K 0.700" in flash.detail
    assert flex.status == UNMEASURED
    flash, *_ = judged(*cells, band(2048, 0.9), band(4096, 0.81))
    assert flash.status == MET


def test_a_length_without_a_time_is_not_passed_over() -> None:
    cells = [cell(2048, SA_LABEL, "triton", 1.0), cell(4096, SA_LABEL, "triton", None)]
    flash, *_ = judged(*cells, band(2048, 0.9), band(4096, 0.9))
    assert flash.status == UNMEASURED and flash.value == pytest.approx(0.9)
    assert "none of ours was timed at n = 4096" in flash.detail
    flash, *_ = judged(*cells, band(2048, 0.5), band(4096, 0.9))
    assert flash.status == MISSED, "what is left already misses it"


@pytest.mark.parametrize(
    "version, status",
    [
        ("FlashAttention-3 (fa3_fwd 0.0.3)", MET),
        ("FlashAttention-2 (flash_attn 2.8.3)", UNMEASURED),
        ("FlashAttention-4 (flash-attn-4 4.0.0b3)", UNMEASURED),
    ],
)
def test_only_version_3_is_the_rival_that_the_goal_names(version: str, status: str) -> None:
    flash, *_ = judged(cell(2048, SA_LABEL, "triton", 1.0), band(2048, 2.0, version))
    assert flash.status == status
    assert version in flash.detail


def test_flex_is_the_rival_and_never_our_kernel() -> None:
    flex = cell(2048, SA_LABEL, "flex", 3.0)
    assert judged(flex)[1].status == UNMEASURED
    goal = judged(flex, cell(2048, SA_LABEL, "banded", 4.0), cell(2048, SA_LABEL, "triton", 2.0))[1]
    assert goal.value == 1.5 and goal.status == MET


@pytest.mark.parametrize("n, target, place", [(32768, 10, 2), (131072, 40, 3)])
def test_speed_against_the_best_full_attention(n: int, target: float, place: int) -> None:
    full = [
        cell(n, "SDPA full", "torch", 90.0, method="full", rival=True),
        cell(n, "full", "FlashAttention-3", target, method="full", rival=True),
    ]
    for ms, status in ((1.0, MET), (1.01, MISSED)):
        goal = judged(*full, cell(n, SA_LABEL, "triton", ms))[place]
        assert goal.status == status and goal.value == pytest.approx(target / ms)
    assert judged(*full)[place].status == UNMEASURED


def test_moba_is_judged_from_8k_up() -> None:
    cells = [
        one
        for n, ms in ((4096, 9.0), (8192, 2.0), (16384, 3.0))
        for one in (cell(n, "full", "flash", 3.0), cell(n, MOBA_LABEL, "triton", ms))
    ]
    goal = judged(*cells)[4]
    assert goal.status == MET and goal.value == 1.0 and "4K" not in goal.detail


def test_memory_that_grows_as_the_square_is_seen() -> None:
    def growing(backend: str, power: float) -> list[AttentionCell]:
        sizes = (2048, 4096, 8192)
        return [cell(n, SA_LABEL, backend, 1.0, extra_bytes=int(n**power)) for n in sizes]

    assert judged(*growing("triton", 1))[5].status == MET
    goal = judged(*growing("triton", 1), *growing("banded", 2))[5]
    assert goal.status == MISSED and goal.value == pytest.approx(2, abs=0.01)
    assert goal.detail.startswith(f"{SA_LABEL} on banded 2.00; ")
    assert judged(*growing("triton", 1), *growing("reference", 2))[5].status == MET
    assert judged(*growing("triton", 1)[:2])[5].status == UNMEASURED
    assert growth_exponent([(1, 5.0), (2, 10.0), (4, 20.0)]) == pytest.approx(1)


def test_the_fastest_of_what_was_chosen() -> None:
    cells = [cell(64, "x", name, ms) for name, ms in (("a", 3.0), ("b", 2.0), ("c", None))]
    found = fastest(cells)
    assert found is not None and found.backend == "b"
    assert fastest(cells[2:]) is None


def case(pattern: Pattern, backend: str = "mine", lengths: tuple[int, ...] = (63, 21)) -> Case:
    return Case(backend, pattern, "float32", 16, 8, 2, lengths)


def register(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor]) -> None:
    backend = Backend("mine", "", lambda p, q, k: (p.name != "moba", "no moba"), attend)
    monkeypatch.setitem(BACKENDS, "mine", backend)


def test_the_grid_finds_a_wrong_a_failing_and_a_refusing_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def second_row_off(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        out = reference.attend(pattern, q, k, v, **rest)
        out[1, 3, 20] += 1e-3
        return out

    def fails(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    register(monkeypatch, reference.attend)
    assert check(case(SA(7)), "cpu").status == PASSED
    assert check(case(MoBA(4)), "cpu") == check_module.Checked(
        case(MoBA(4)), REFUSED, reason="no moba"
    )
    register(monkeypatch, second_row_off)
    assert check(case(SA(7)), "cpu").status == WRONG
    register(monkeypatch, fails)
    failed = check(case(Full()), "cpu")
    assert (failed.status, failed.reason) == (FAILED, "RuntimeError: no such kernel")


@pytest.mark.parametrize("backend", ["reference", "banded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_plain_backends_pass_the_grid(backend: str, dtype: str) -> None:
    cases = [c for c in grid([backend], small=True) if c.dtype == dtype and max(c.lengths) < 64]
    assert len(cases) >= 14 and len(cases[-1].lengths) == 2
    cases = cases[:14]
    found = [check(one, "cpu") for one in cases]
    assert [one for one in found if one.status != PASSED] == []


def test_the_grid_covers_what_it_promises() -> None:
    every = grid(["flex", "triton"], small=False)
    own = [one for one in every if one.backend == "triton"]
    assert {(c.dtype, c.head_dim, c.heads, c.kv_heads) for c in own} == {
        (dtype, width, *heads)
        for dtype in ("float32", "bfloat16", "float16")
        for width in (64, 96, 128)
        for heads in ((8, 2), (9, 3))
    }
    assert {max(c.lengths) for c in own} == {1, 63, 1000, 4096}
    assert {len(c.lengths) for c in own} == {1, 2}
    large = {c.pattern for c in own if c.lengths == (4096,)}
    assert {SWA(256), SA(256), Full()} <= large
    assert {p.circular for p in large if isinstance(p, SA)} == {True, False}
    assert any(isinstance(p, SA) and p.per_head for p in large)
    assert len(set(own)) == len(own)
    assert own[0].dtype == "bfloat16" and own[0].head_dim == 128
    assert 0 < len(every) - len(own) < len(own) / 4, "flex compiles for long"


def test_checks_stop_in_time_and_can_go_on() -> None:
    waiting = iter(grid(["reference"], small=True))
    first = check_module.run_checks(waiting, "cpu", time.monotonic() - 1, lambda line: None)
    assert len(first) == 1
    rest = check_module.run_checks(waiting, "cpu", time.monotonic() - 1, lambda line: None)
    assert len(rest) == 1 and rest[0].case != first[0].case


@pytest.fixture
def plain_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(BACKENDS) - {"reference", "banded"}:
        monkeypatch.delitem(BACKENDS, name)


@pytest.mark.usefixtures("plain_backends")
def test_a_rehearsal_writes_everything_and_judges_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = goal_sheet.run_goal_sheet(tmp_path, device="cpu", small=True, budget=1.5)
    printed = capsys.readouterr().out
    assert status == 0 and "rehearsal on a CPU" in printed
    content = json.loads((tmp_path / "goals.json").read_text())
    assert content["rehearsal"] and len(content["goals"]) == 6
    assert {goal["status"] for goal in content["goals"]} == {UNMEASURED}
    assert {one["status"] for one in content["checks"]} == {PASSED}
    assert "**This is a rehearsal on a CPU" in (tmp_path / "goals.md").read_text()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"goals.json", "goals.md", "attention.json", "attention.md"} <= names


@pytest.mark.usefixtures("plain_backends")
def test_a_wrong_backend_is_on_the_sheet_and_in_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def zeros(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        return torch.zeros_like(q)

    register(monkeypatch, zeros)
    status = goal_sheet.run_goal_sheet(tmp_path, device="cpu", small=True, budget=1.0)
    assert status == 1
    sheet = (tmp_path / "goals.md").read_text()
    assert "- wrong: mine full" in sheet and "Nothing was wrong" not in sheet
    assert "wrong: mine" in capsys.readouterr().out


def test_what_was_measured_is_on_disk_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_backends: None
) -> None:
    def stopped(*args: Any, **rest: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(goal_sheet, "run_bench", stopped)
    with pytest.raises(KeyboardInterrupt):
        goal_sheet.run_goal_sheet(tmp_path, device="cpu", small=True, budget=1.0)
    content = json.loads((tmp_path / "goals.json").read_text())
    assert content["checks"] and content["goals"] == []
    assert "Not reached." in (tmp_path / "goals.md").read_text()


def test_a_machine_without_a_gpu_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no CUDA device"):
        goal_sheet.run_goal_sheet(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_goal_sheet_needs_neither_rich_nor_transformers_nor_matplotlib(tmp_path: Path) -> None:
    """It runs from a bare clone; whatever else is imported there must be optional."""
    barred = (
        *("rich", "matplotlib", "transformers", "lm_eval", "yaml", "datasets", "accelerate"),
        "pydantic",
    )
    code = f"""
import sys
from pathlib import Path
for name in {barred}:
    sys.modules[name] = None
from sa_patch.benchmark.attention import goal_sheet
from sa_patch.benchmark.attention.record import AttentionBench, AttentionCell
from sa_patch.benchmark.attention.run import write
shape = dict.fromkeys(("heads", "kv_heads", "head_dim", "batch", "dtype"), 1)
session = {{"hardware": {{"cpu": ""}}, "versions": {{}}, "started": ""}}
bench = AttentionBench(session, shape | {{"device": "cpu", "threads": 1}})
bench.cells.append(AttentionCell(
    n=64, label="full", method="full", backend="banded", rival=False, window=None, samples_ms=[1.0]
))
names = [path.name for path in write(Path({str(tmp_path)!r}) / "it", bench)]
assert names == ["it.json", "it.md"], names
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
