"""scripts/estimate_grid: hours from what a run measured, or from a speed that is assumed."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from sa_patch.kernels.visited_keys import visited_share
from sa_patch.patterns import SWA

SCRIPT = Path(__file__).parents[2] / "scripts" / "estimate_grid"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Script":
    return Script(monkeypatch, capsys)


class Script:
    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = patch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit status, and all that was said."""
        self._patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        captured = self._capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out + captured.err


def hours(said: str) -> float:
    return float(re.findall(r"([\d.]+) hours of one device", said)[0])


def test_an_estimate_of_the_published_run_comes_near_the_time_that_it_took(script: Script) -> None:
    status, said = script("--check")
    estimated, taken = re.findall(r"together: (\d+) s estimated, (\d+) s taken", said)[0]
    assert status == 0 and abs(int(estimated) / int(taken) - 1) < 0.1


def test_assumed_hours_are_tokens_and_steps_over_their_speed(script: Script) -> None:
    def assumed(speed: str, step: str) -> float:
        speeds = ("--tokens-per-second", speed, "--seconds-per-step", step)
        status, said = script("qwen3-8b", "--no-reuse", *speeds)
        assert status == 0 and "qwen3-8b: 217 cells, 142 million tokens" in said
        return hours(said)

    # 164 problems in 11 batches of 16, 1,024 steps each, in 31 cells.
    assert assumed("1e12", "1") == pytest.approx(31 * 11 * 1024 / 3600, abs=0.1)
    assert assumed("1000", "1e-9") == pytest.approx(142e3 / 3600, abs=0.2)


def test_measured_hours_grow_with_the_data(script: Script) -> None:
    status, said = script("smollm2-seven", "--no-reuse")
    # 50 items of HellaSwag took 303 s in 31 cells, and it has 10,042.
    assert status == 0 and re.search(r"hellaswag .* 16.92 h", said)


def test_what_a_tile_reads_stands_beside_the_hours(script: Script) -> None:
    status, said = script("smollm2-seven", "--group", "3")
    assert status == 0 and "(3 query heads to a KV head)" in said
    # A window of 16 at the mean prompt: the blocks of 16 that a tile of 42 rows touches.
    (tokens,) = re.findall(r"swa:window=16 .*% at (\d+) tokens", said)
    (share,) = re.findall(r"swa:window=16 +([\d.]+)%", said)
    assert float(share) / 100 == pytest.approx(visited_share(SWA(16), int(tokens), 3), abs=1e-3)
    assert "moba:block_size=8,topk=2 " in said and "depends on the text" in said


def test_saturated_prompts_are_left_out_of_a_run_that_ran_them(script: Script) -> None:
    _, everything = script("smollm2-seven", "--no-reuse")
    status, said = script("smollm2-seven")
    share = int(re.findall(r"hellaswag .* x +(\d+)% =", said)[0]) / 100
    # Of 31 cells that of full attention is run whole.
    assert status == 0 and 1 / 31 < share < 0.5
    assert hours(said) < 0.5 * hours(everything)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo"], "needle_256 is not in that run"),
        (["--tokens-per-second", "5"], "go together"),
        (["--tokens-per-second", "0", "--seconds-per-step", "1"], "go together, and are above 0"),
        (["--measured", "nowhere"], "nowhere holds no finished cells"),
        (["qwen3"], "no sweep file 'qwen3'"),
        (["--group", "0"], "--group must be a whole number of at least 1"),
    ],
)
def test_mistakes_are_one_sentence(script: Script, arguments: list[str], sentence: str) -> None:
    status, said = script(*arguments)
    assert status == 2 and sentence in said and said.count("\n") == 1


def cell(task: str, method: str, seconds: float) -> dict[str, object]:
    return {
        "status": "done",
        "cell": {"task": task, "method": method},
        "measured": {"tokens": 100},
        "seconds": seconds,
    }


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ([cell("boolq", "full", 2.0), cell("boolq", "sa", 1.0)], "1 cells: 2 s estimated, 1 s"),
        ([cell("boolq", "full", 2.0)], "the run has cells of full attention alone"),
        ([cell("humaneval", "sa", 2.0)], "no cells of full attention on humaneval"),
        (["{"], "is torn"),
    ],
)
def test_a_run_need_not_hold_every_kind_of_cell(
    script: Script, tmp_path: Path, cells: list[object], says: str
) -> None:
    (tmp_path / "cells").mkdir()
    for number, one in enumerate(cells):
        text = one if isinstance(one, str) else json.dumps(one)
        (tmp_path / "cells" / f"{number}.json").write_text(text)
    status, said = script("--measured", str(tmp_path), "--check")
    assert says in said and (status == 0) == ("estimated, 1 s" in said)
    assert status == 0 or said.count("\n") == 1
