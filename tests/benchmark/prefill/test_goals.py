"""What full-size prefill is held to is judged from the right cells.

Seen red when the slowest rival or our slowest backend was taken, and when a goal was always met.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from sa_patch.benchmark.goals import MET, MISSED, UNMEASURED, goal_lines
from sa_patch.benchmark.prefill.goals import JUDGED, judge_goals
from sa_patch.benchmark.prefill.parts import CORE
from sa_patch.benchmark.prefill.record import Prefill, PrefillBench
from sa_patch.benchmark.prefill.tables import markdown
from sa_patch.benchmark.record import TIMED, write_results


def cell(n: int, label: str, backend: str, seconds: float | None, **rest: Any) -> Prefill:
    timed = {"samples_ms": [1e3 * seconds], "status": TIMED} if seconds is not None else {}
    values: dict[str, Any] = {
        "n": n,
        "label": label,
        "backend": backend,
        "full": label in ("stock", "full"),
    }
    return Prefill(model="qwen3-8b", **(values | timed | rest))


def judged(*cells: Prefill) -> dict[str, tuple[str, float | None]]:
    goals = judge_goals(PrefillBench({}, {}, cells=list(cells)), "qwen3-8b")
    return {goal.name: (goal.status, goal.value) for goal in goals}


def test_goals_take_the_fastest_rival_and_our_fastest_backend() -> None:
    found = judged(
        cell(32768, "stock", "", 3.0, extra_bytes=100),
        cell(32768, "full", "flash", 1.5),
        cell(
            32768,
            JUDGED,
            "triton",
            1.0,
            extra_bytes=101,
            draw_seconds=1e-3,
            calls={"triton": 36},
            parts={CORE: 0.36},
        ),
        cell(32768, JUDGED, "banded", 9.0, extra_bytes=10),
        cell(131072, "stock", "", 20.0),
        cell(131072, "full", "flash", 8.0),
        cell(131072, JUDGED, "triton", 4.0),
    )
    values = list(found.values())
    assert values[0] == (MET, 1.5)
    assert values[1] == (MISSED, 2.0)
    assert values[2] == (MISSED, 1.01)
    assert values[4][0] == MISSED and values[4][1] == pytest.approx(0.1)
    assert [status for status, _ in (values[3], values[5])] == [UNMEASURED] * 2


def test_nothing_measured_meets_nothing() -> None:
    assert {status for status, _ in judged().values()} == {UNMEASURED}
    skipped = cell(32768, JUDGED, "triton", None, reason="no time left")
    goals = judge_goals(PrefillBench({}, {}, cells=[skipped]), "qwen3-8b")
    assert goals[0].detail == "no time left"


def test_goals_are_in_the_files_as_they_were_judged(tmp_path: Path) -> None:
    hardware = {"gpus": ["a GPU"], "cpu": "a CPU"}
    provenance = {"hardware": hardware, "versions": {"torch": "2", "transformers": "5"}}
    options = {"device": "cuda", "small": False, "threads": 1, "dtype": "bfloat16"}
    cells = [cell(32768, "stock", "", 3.0), cell(32768, JUDGED, "triton", 1.5)]
    bench = PrefillBench(provenance, options, cells=cells)
    bench.goals = judge_goals(bench, "qwen3-8b")
    write_results(tmp_path / "prefill", bench.content())
    (met, far, *_) = json.loads((tmp_path / "prefill.json").read_text())["goals"]
    assert (met["status"], met["value"], far["status"]) == (MET, 2.0, UNMEASURED)
    assert met["detail"] == "1.50 s on triton, 3.00 s stock"
    row = f"| {met['name']} | 1.4 | 2.00 | met | {met['detail']} |"
    assert row in markdown(bench).splitlines()
    assert f"| {far['name']} | 3 | - | {UNMEASURED} | {far['detail']} |" in markdown(bench)
    assert goal_lines(bench.goals)[:3] == [
        f"MET: {met['name']}: 2.00, target 1.4",
        f"    {met['detail']}",
        f"COULD NOT BE MEASURED: {far['name']}: -, target 3",
    ]


def test_the_record_has_the_names_of_published_ones() -> None:
    path = (
        Path(__file__).resolve().parents[3] / "eval/results/prefill/smollm2-135m-cpu/prefill.json"
    )
    published = json.loads(path.read_text())
    content = PrefillBench({}, {}, [cell(64, JUDGED, "triton", 1.0)]).content()
    assert set(content) == set(published)
    assert {name: content[name] for name in ("kind", "schema")} == {
        name: published[name] for name in ("kind", "schema")
    }
    assert set(content["prefills"][0]) == set(published["prefills"][0])
