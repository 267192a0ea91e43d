"""The stages of a GPU visit: rehearsed on the CPU, resumed, failing, refused."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_patch.benchmark.attention.record import read_bench
from sa_patch.benchmark.prefill.record import read_prefill
from sa_patch.benchmark.record import SKIPPED, TIMED
from sa_patch.benchmark.stages import flash, speed, tune
from sa_patch.benchmark.stages import run as stages
from sa_patch.benchmark.stages.run import ARCHIVE, SECONDS, run_stages
from sa_patch.benchmark.stages.stage import Found, Visit
from sa_patch.errors import UserError
from sa_patch.files.archive import unpack_archive
from sa_patch.kernels.triton.launch_table import USES
from tests.run_script import refusal

ROOT = Path(__file__).resolve().parents[2]
# The script runs where torch, Triton, transformers and accelerate alone are installed.
BARRED = ("rich", "matplotlib", "lm_eval", "datasets", "gguf", "pydantic", "ray", "typer")
CODE = """
import runpy, sys
for name in {barred}:
    sys.modules[name] = None
from tests.interpreter import prepare_once_per_launch
prepare_once_per_launch()
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which every stage ran, and what was printed."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("rehearsed")
    out = folder / "out"
    argv = [str(ROOT / "scripts/gpu_stages"), "--device", "cpu", "--small", "--out", str(out)]
    code = CODE.format(barred=BARRED, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    unpack_archive(out / ARCHIVE, folder)
    # No more than eight come back from a machine that is lent, and somebody may keep a log.
    sent = {path.name for path in out.iterdir()}
    assert len(sent) <= 7 and {ARCHIVE, "stages.json", "attention.md", "model.md"} <= sent
    return folder / "stages", done.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def visit(out: Path, seconds: float = 60.0) -> Visit:
    return Visit(out, "cpu", True, time.monotonic() + seconds, lambda line: None)


def test_every_stage_is_rehearsed(rehearsed: tuple[Path, str]) -> None:
    out, said = rehearsed
    found = read(out / "stages.json")["stages"]
    assert list(found) == list(SECONDS)
    for name, one in found.items():
        assert (one["status"], one["wrong"]) == ("complete", []), name
        assert one["rows"] and f"\n{name}: complete in" in said
    assert {one["status"] for one in read(out / "check.json")["cases"].values()} == {"passed"}
    checked = read(out / "flash_check.json")["cases"]
    assert {one["status"] for one in checked.values()} == {"passed"}
    assert read_bench(out / "flash/attention.json").where(status=TIMED)
    for version in (2, 3, 4):
        assert f"rival: full, FlashAttention-{version} " in said
    for stem in ("model", "moe"):
        bench = read_prefill(out / f"{stem}.json")
        assert bench.complete and all(cell.status == TIMED for cell in bench.cells)
        assert all(cell.parts and cell.extra_bytes is not None for cell in bench.cells)
        assert bench.verdicts and (out / f"{stem}.md").exists()
    (table,) = out.glob("interpreter-*.json")
    assert {key.split()[0] for key in read(table)["entries"]} == set(USES)


def test_what_is_complete_is_not_measured_again(rehearsed: tuple[Path, str]) -> None:
    out, _ = rehearsed
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    said: list[str] = []
    began = time.monotonic()
    assert run_stages(list(SECONDS), out, device="cpu", small=True, say=said.append) == 0
    assert time.monotonic() - began < 5
    assert said[: len(SECONDS)] == [f"{name}: complete from an earlier call" for name in SECONDS]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_only_what_found_no_time_is_measured(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    for stem in ("attention", "model"):
        content = read(rehearsed[0] / f"{stem}.json")
        cell = content["cells" if stem == "attention" else "prefills"][1]
        cell["status"] = SKIPPED
        cell["samples_ms" if stem == "attention" else "seconds"] = []
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    then = read_bench(rehearsed[0] / "attention.json")
    found = speed.time_attention(visit(tmp_path))
    now = read_bench(tmp_path / "attention.json")
    assert found.missing == 0 and len(now.cells) == len(then.cells)
    assert [cell.samples_ms for cell in now.cells[1:-1]] == [
        cell.samples_ms for index, cell in enumerate(then.cells) if index > 1
    ]
    # The baseline's earlier calls stay; what is measured now is paired with new ones.
    assert len(then.cells[0].samples_ms) == 2 * 3 and then.cells[0].passes == [0] * 3 + [1] * 3
    assert now.cells[0].samples_ms[: 2 * 3] == then.cells[0].samples_ms
    assert now.cells[-1].passes == [2] * 3 == now.cells[0].passes[2 * 3 :]
    assert now.cells[-1].label == then.cells[1].label and now.cells[-1].status == TIMED
    earlier = read_prefill(rehearsed[0] / "model.json")
    assert speed.time_model(visit(tmp_path)).missing == 0
    model = read_prefill(tmp_path / "model.json")
    assert model.verdicts == earlier.verdicts
    kept = {(c.n, c.name): c.seconds for c in earlier.cells}
    again = [c.name for c in model.cells if kept[c.n, c.name] != pytest.approx(c.seconds)]
    assert again == [earlier.cells[1].name]


def test_a_stage_without_time_says_what_is_missing(tmp_path: Path) -> None:
    assert tune.tune_kernels(visit(tmp_path, seconds=-1)).missing == 2 * len(USES)
    assert not list(tmp_path.iterdir())


def test_checks_of_flash_leave_time_for_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[float] = []

    def check(visit: Visit, *_: Any) -> Found:
        now = time.monotonic()
        left.append(visit.deadline - now)
        # They take all that they may.
        monkeypatch.setattr(time, "monotonic", lambda: now + left[0])
        return Found([], missing=3)

    def timed(visit: Visit, *_: Any) -> Found:
        left.append(visit.left)
        return Found([])

    monkeypatch.setattr(flash, "check_cases", check)
    monkeypatch.setattr(flash, "time_layer", timed)
    monkeypatch.setattr(flash, "read_bench", lambda path: None)
    monkeypatch.setattr(flash, "_missing", lambda bench: [])
    assert flash.time_flash(visit(tmp_path, seconds=100)).missing == 3
    checking, timing = left
    assert 30 < checking < 50 < timing < 70


def test_torn_files_are_measured_again(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copy(rehearsed[0] / "stages.json", tmp_path / "attention.json")
    (tmp_path / "stages.json").write_text('{"kind": "sa_')
    assert run_stages(["attention"], tmp_path, device="cpu", small=True, say=lambda line: None) == 0
    assert read_bench(tmp_path / "attention.json").complete


def test_a_stage_that_fails_lets_the_next_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def stage(name: str) -> Any:
        def run(visit: Visit) -> Found:
            asked.append(name)
            if name == "check" and asked.count("check") == 1:
                raise RuntimeError("the kernel\nbroke")
            return Found([("speed", "1 ms")])

        return run

    monkeypatch.setattr(stages, "_stage", stage)
    said: list[str] = []
    names = ["check", "attention"]
    assert run_stages(names, tmp_path, device="cpu", small=True, say=said.append) == 1
    found = read(tmp_path / "stages.json")["stages"]
    assert found["check"]["status"] == "failed" and "the kernel" in found["check"]["reason"]
    assert found["attention"]["status"] == "complete"
    assert said[-1] == "  speed  1 ms"
    # It is tried again, and only it.
    assert run_stages(names, tmp_path, device="cpu", small=True, say=said.append) == 0
    assert asked == ["check", "attention", "check"]


@pytest.mark.parametrize(
    "given, words",
    [
        (["--stages", "atention"], "did you mean 'attention'"),
        (["--stages", ","], "name at least one stage of check, attention, model, tune, moe, flash"),
        (["--device", "cuda", "--small"], "torch sees no CUDA device here; use --device cpu"),
        (["--device", "cpu"], "on a CPU the stages are only rehearsed; give --small too"),
    ],
)
def test_refusals_are_one_sentence(
    given: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "new"
    line = refusal("gpu_stages", [*given, "--out", str(out)], monkeypatch, capfd)
    assert line.startswith("gpu_stages: error: ") and words in line
    assert not out.exists()


def test_a_folder_of_another_run_is_refused(
    rehearsed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="give another --out"):
        run_stages(["check"], rehearsed[0], device="cuda")


def test_tuning_for_the_user_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        tune.tune_for_user("cpu", 1.0, print)
