"""The command: help at once, one sentence and status 2 for a mistake, and each subcommand."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

from sa_patch.cli.command import main
from sa_patch.patterns import PATTERNS
from tests.processes import run
from tests.tiny_checkpoint import save_tiny_checkpoint

GRID: dict[str, Any] = {
    "windows": [16],
    "methods": ["full", "swa"],
    "tasks": ["needle_128"],
    "limit": 1,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def write_sweep(folder: Path, **changes: Any) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}))
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in ("sweep", "generate", "calibrate", "analyze"))],
)
def test_help_teaches_and_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from sa_patch.cli.command import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'numpy', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["frobnicate"], ["sweep"], ["sweep", "a", "--limit", "x"]]
)
def test_what_cannot_be_parsed_is_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence on stderr of a command that is refused with status 2."""
    assert main(arguments) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sa-patch: error: "), shown.err
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["saa"]}, "unknown method 'saa'; did you mean 'sa'?"),
        ({"windows": [0]}, "windows[0] must be at least 1, got 0"),
        ({"windows": [-1]}, "windows[0] must be at least 1, got -1"),
        ({"windows": [1.5]}, "windows[0] must be a whole number, got 1.5"),
        ({"windows": ["x"]}, "windows[0] must be a whole number, got 'x'"),
        ({"methods": [{"method": "moba", "topk": 0}]}, "topk must be a whole number of at least 1"),
        ({"layers": [9]}, "layers [9] are not attention layers of this model; it has 0-2"),
        ({"model": "./nowhere"}, "no model at nowhere"),
        ({"windws": [16]}, "unknown key 'windws' in the sweep file; did you mean 'windows'?"),
        ({"tasks": ["needle_12"]}, "unknown task 'needle_12'; did you mean 'needle"),
        ({"methods": []}, "the grid is empty"),
        ({"tasks": ["humaneval"]}, "add --confirm-run-unsafe-code if you accept that"),
    ],
)
def test_bad_sweeps(
    changes: dict[str, Any],
    sentence: str,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sweep = write_sweep(tmp_path, **{"model": str(checkpoint), **changes})
    assert sentence in refused(capfd, "sweep", sweep, "--out", str(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("cells/*"))


def test_a_corrupt_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(3))
    sweep = write_sweep(tmp_path, model=str(tmp_path / "model.gguf"))
    assert "corrupt GGUF" in refused(capfd, "sweep", sweep, "--out", str(tmp_path / "run"))
    said = refused(capfd, "generate", str(tmp_path / "model.gguf"), "hello")
    assert "corrupt GGUF" in said


def test_an_output_folder_that_cannot_be_written(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep(tmp_path, model=str(checkpoint))
    said = refused(capfd, "sweep", sweep, "--out", f"{sweep}/run")
    assert "cannot be written" in said and "--out" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "swa", "--window", "0"], "window must be a whole number of at least 1"),
        (["--method", "saa"], "unknown method 'saa'"),
        (["--method", "swa", "--seed", "1"], "has no parameter 'seed'"),
        (["--method", "sa:window=x"], "window must be a whole number"),
        (["--method", "sa:window=4", "--window", "5"], "holds the parameters already"),
        (["--method", "sinks:4+swa:6", "--topk", "5"], "holds the parameters already"),
        (["--method", "sinks:4+swa:6", "--seed", "5"], "draws nothing at random"),
        (["--method", "sinks+swa"], "method 'swa' needs 'window'"),
        (["--layers", "nowhere.yaml"], "no schedule file nowhere.yaml"),
        (["--layers", "9"], "layers [9] are not attention layers"),
        (["--backend", "bandit"], "did you mean 'banded'"),
        (["--decode", "sometimes"], "decode"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--dtype", "float7"], "unknown dtype 'float7'; did you mean 'float"),
        (["--chat"], "has no chat template"),
    ],
)
def test_bad_generate(
    options: list[str], sentence: str, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capfd, "generate", str(checkpoint), "The old man", *options)


@pytest.mark.parametrize(
    "options",
    [["--backend", "bandit"], ["--decode", "sometimes"], ["--layers", "x"], ["--window", "0"]],
)
def test_bad_generate_is_refused_before_the_model_is_looked_at(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "no-model")
    assert "no-model" not in refused(capfd, "generate", nowhere, "The old man", *options)


def test_report_of_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no run folder at" in refused(capfd, "report", str(tmp_path / "nowhere"))


def test_sweep_then_report(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep, out = write_sweep(tmp_path, model=str(checkpoint)), str(tmp_path / "run")
    assert main(["sweep", sweep, "--out", out, "--dry-run"]) == 0
    assert "2 cells, 0 done" in capfd.readouterr().out
    assert main(["sweep", sweep, "--out", out]) == 0
    assert f"sa-patch report {out}" in capfd.readouterr().out
    assert main(["report", out]) == 0
    assert str(tmp_path / "run" / "results.md") in capfd.readouterr().out
    assert (tmp_path / "run" / "results.csv").is_file()
    torn = next((tmp_path / "run" / "cells").iterdir())
    torn.write_text(torn.read_text()[:50])
    (tmp_path / "run" / "results.csv").unlink()
    assert main(["report", out]) == 2
    said = capfd.readouterr().err
    assert (
        said.startswith("sa-patch: error: the report leaves out 1 cell file") and torn.name in said
    )
    assert (tmp_path / "run" / "results.csv").is_file()
    assert main(["sweep", sweep, "--out", out]) == 0
    assert f"cells/{torn.name} is torn" in capfd.readouterr().err
    assert main(["report", out]) == 0


def test_generate_streams_the_continuation(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--pattern", "swa", "--window", "4", "--max-new-tokens", "8"]
    assert main(["generate", str(checkpoint), "The old man", *options]) == 0
    shown = capfd.readouterr()
    assert shown.out.startswith("The old man") and len(shown.out) > len("The old man\n")
    assert "attention by" not in shown.err
    assert main(["generate", str(checkpoint), "The old man", *options, "--verbose"]) == 0
    again = capfd.readouterr()
    assert again.out == shown.out
    (said,) = (line for line in again.err.splitlines() if "attention by" in line)
    assert re.fullmatch(
        r"attention by (banded|reference) \(\d+ calls\).*; "
        r"prompt of \d+ tokens at [\d,]+ a second; "
        r"new tokens at [\d,.]+ a second",
        said,
    )


def test_generate_takes_a_composed_pattern_and_a_schedule_file(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text("layers: {0: full, 1-2: 'swa:2'}\n")
    shown = []
    for options in (
        ["--method", "full"],
        ["--method", "sinks:2+swa:3+sa:3", "--seed", "4", "--decode", "pattern"],
        ["--method", "sinks:2+swa:3", "--decode", "pattern", "--layers", str(schedule)],
        ["--method", "full", "--decode", "pattern", "--layers", str(schedule)],
    ):
        options += ["--max-new-tokens", "12"]
        assert main(["generate", str(checkpoint), "The old man", *options]) == 0
        shown.append(capfd.readouterr().out)
    assert len(set(shown[:3])) == 3
    # The file gives every layer a pattern, so that none is left for the method.
    assert shown[2] == shown[3]


def test_methods_lists_patterns_and_backends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Wide enough that no cell is broken over lines.
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["methods", "--n", "64", "--heads", "4", "--kv-heads", "2"]) == 0
    shown = capfd.readouterr().out
    for name in (*PATTERNS, "reference", "banded", "flex", "flash", "triton"):
        assert name in shown
    # What auto takes is said beside each method.
    assert shown.count("reference (cpu)") == len(PATTERNS)
    assert "not fast on a GPU: small blocks that every query chooses for itself" in shown
    assert "shared_topk, whose speed was not measured" in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--n", "0"], "n must be a whole number of at least 1"),
        (["--kv-heads", "0"], "kv_heads must be a whole number of at least 1"),
        (["--heads", "3", "--kv-heads", "2"], "heads must be a multiple of kv_heads"),
    ],
)
def test_methods_of_no_layer_are_refused(
    options: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert says in line


def test_bench_writes_what_it_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "64,96", "--window", "8", "--methods", "sa,swa", "--backends", "banded"]
    sizes = ["--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--repeats", "3"]
    assert main(["bench", *options, *sizes, "--out", str(tmp_path)]) == 0
    assert "sa:window=8" in capfd.readouterr().out
    written = json.loads((tmp_path / "attention.json").read_text())
    assert written["complete"] and len(written["cells"]) == 2 * 3
    assert (tmp_path / "attention.md").exists() and (tmp_path / "attention.png").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--n", "1K,x"], "n takes whole numbers"),
        (["--methods", "saa"], "did you mean 'sa'"),
        (["--backends", "bandit"], "did you mean 'banded'"),
        (["--heads", "3", "--kv-heads", "2"], "multiple"),
        (["--plan", "--n", "0"], "n must be a whole number of at least 1"),
        (["--plan", "--heads", "0"], "heads must be a whole number of at least 1"),
        (["--plan", "--kv-heads", "0"], "kv_heads must be a whole number of at least 1"),
        (["--plan", "--head-dim", "0"], "head_dim must be a whole number of at least 1"),
        (["--plan", "--heads", "3", "--kv-heads", "2"], "multiple"),
    ],
)
def test_bad_benchmarks_are_refused(
    options: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    error = capfd.readouterr().err
    assert says in error and "Traceback" not in error


# lm-eval's index of its own 14,000 files, which takes seconds, has no part in this.
OURS_ALONE = """import functools, sys, lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
from sa_patch.cli.command import main
sys.exit(main(sys.argv[1:]))"""


def test_lm_evals_own_command_has_our_model_and_tasks(checkpoint: Path, tmp_path: Path) -> None:
    done = run(
        *["-c", OURS_ALONE, "lm-eval", "--model", "sa-patch"],
        *["--tasks", "needle_128", "--limit", "2"],
        *["--model_args", f"pretrained={checkpoint},method=sa,window=16,seed=1,dtype=float32"],
        *["--device", "cpu", "--output_path", str(tmp_path), "--verbose"],
        environment={"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "needle_128" in done.stdout
    assert re.search(
        r"attention by \w+ \([\d,]+ calls\).*; prompts of [\d,]+ tokens at", done.stderr
    )
    assert list(tmp_path.rglob("results_*.json"))


def test_lm_evals_command_refuses_a_bad_pattern_in_one_sentence(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # lm-eval's index of its own 14,000 files, which takes seconds, has no part in this.
    ours_alone = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", ours_alone)
    model = f"pretrained={checkpoint},method=saa,window=16"
    options = ["--model", "sa-patch", "--tasks", "needle_128", "--limit", "1", "--device", "cpu"]
    assert main(["lm-eval", "run", *options, "--model_args", model]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("sa-patch: error: unknown method 'saa'")


def test_lm_evals_help_is_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["lm-eval", "--help"])
    assert not end.value.code
    assert "Language Model Evaluation Harness" in capfd.readouterr().out
