"""How the goals for a GPU are judged, and how one case is checked against float64.

Seen red when the best length stood for the worst, a length without a time was passed over, any
FlashAttention counted as version 3, FlexAttention counted as our kernel, and a wrong backend
passed.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sa_patch.benchmark.attention.cases import PASSED, REFUSED, Case, Checked, check
from sa_patch.benchmark.attention.correctness import Verdict
from sa_patch.benchmark.attention.goals import growth_exponent, judge_goals
from sa_patch.benchmark.attention.record import AttentionBench, AttentionCell
from sa_patch.benchmark.goals import MET, MISSED, UNMEASURED, Goal
from sa_patch.benchmark.record import FAILED, SKIPPED, TIMED, WRONG, fastest
from sa_patch.benchmark.stages.speed import write_goals
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
    assert [goal.status for goal in judged()] == [UNMEASURED] * 5
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

    assert judged(*growing("triton", 1))[-1].status == MET
    goal = judged(*growing("triton", 1), *growing("banded", 2))[-1]
    assert goal.status == MISSED and goal.value == pytest.approx(2, abs=0.01)
    assert goal.detail.startswith(f"{SA_LABEL} on banded 2.00; ")
    assert judged(*growing("triton", 1), *growing("reference", 2))[-1].status == MET
    assert judged(*growing("triton", 1)[:2])[-1].status == UNMEASURED
    assert growth_exponent([(1, 5.0), (2, 10.0), (4, 20.0)]) == pytest.approx(1)


def test_goals_are_written_with_what_they_were_judged_from(tmp_path: Path) -> None:
    cells = [cell(32768, "full", "flash", 9.0, method="full"), cell(32768, SA_LABEL, "triton", 1.0)]
    rows = write_goals(tmp_path, AttentionBench({"gpu": "a card"}, {}, cells=cells))
    assert ("goal: SA over the best full attention at 32K", MISSED) in rows
    content = json.loads((tmp_path / "goals.json").read_text())
    assert content["provenance"] == {"gpu": "a card"} and len(content["goals"]) == len(rows)
    assert "| 9.00 | missed |" in (tmp_path / "goals.md").read_text()


def test_the_fastest_of_what_was_chosen() -> None:
    cells = [cell(64, "x", name, ms) for name, ms in (("a", 3.0), ("b", 2.0), ("c", None))]
    found = fastest(cells)
    assert found is not None and found.backend == "b"
    assert fastest(cells[2:]) is None


def case(pattern: Pattern, backend: str = "mine", lengths: tuple[int, ...] = (63, 21)) -> Case:
    return Case(backend, pattern, "float32", 16, 8, 2, lengths)


def refusing_moba(pattern: Pattern) -> tuple[bool, str]:
    return (False, "no moba") if pattern.name == "moba" else (True, "")


def register(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor]) -> None:
    backend = Backend("mine", "", lambda p, q, k: refusing_moba(p), attend)
    monkeypatch.setitem(BACKENDS, "mine", backend)


def test_a_check_finds_a_wrong_a_failing_and_a_refusing_backend(
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
    assert check(case(MoBA(4)), "cpu") == Checked(case(MoBA(4)), REFUSED, reason="no moba")
    register(monkeypatch, second_row_off)
    assert check(case(SA(7)), "cpu").status == WRONG
    register(monkeypatch, fails)
    failed = check(case(Full()), "cpu")
    assert (failed.status, failed.reason) == (FAILED, "RuntimeError: no such kernel")


@pytest.mark.parametrize("backend", ["reference", "banded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_plain_backends_pass_every_check(backend: str, dtype: str) -> None:
    patterns = (Full(), SWA(7), SA(7, seed=1, circular=False), SA(2, per_head=True), MoBA(3, 2))
    for lengths in ((1,), (63, 21)):
        for pattern in patterns:
            one = Case(backend, pattern, dtype, 64, 9, 3, lengths)
            assert check(one, "cpu").status == PASSED, one


def test_the_attention_stage_needs_neither_rich_nor_transformers_nor_matplotlib(
    tmp_path: Path,
) -> None:
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
from sa_patch.benchmark.stages import speed
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
