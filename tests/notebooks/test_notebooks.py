"""The notebooks run from beginning to end without a warning, and are stored without outputs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbmake.nb_result import NotebookResult
from nbmake.nb_run import NotebookRun

from tests.thorough import THOROUGH
from tests.tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "eval" / "notebooks"
NOTEBOOKS = ["explore", "quickstart"]
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
# A cell may wait for cores that it shares with the other tests.
CELL_SECONDS = 900


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel with this interpreter and this clone, whatever else is installed."""
    name = "sa-patch-tests"
    spec = tmp_path / "jupyter" / "kernels" / name / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": name, "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    # Neither the user's start-up files nor traces in their home.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return name


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """The folder in which a notebook is run."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The notebooks' model, or a small one with as many layers and heads, which takes seconds."""
    if THOROUGH:
        return "smollm2-135m"
    return str(
        save_tiny_checkpoint(
            tmp_path_factory.mktemp("model"),
            chat=True,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            hidden_size=72,
        )
    )


def run(path: Path, kernel: str) -> NotebookResult:
    """Execute a notebook in its folder; the file is left as it is."""
    return NotebookRun(path, CELL_SECONDS, kernel=kernel).execute()


def run_cell(source: str, folder: Path, kernel: str) -> NotebookResult:
    path = folder / "own.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    return run(path, kernel)


def test_these_are_all_notebooks() -> None:
    assert sorted(path.stem for path in FOLDER.glob("**/*.ipynb")) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name: str, model: str, empty: Path, kernel: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert "smollm2-135m" in text
    copy = empty / f"{name}.ipynb"
    copy.write_text(text.replace("smollm2-135m", model), encoding="utf-8")
    result = run(copy, kernel)
    assert result.error is None, result.error.trace
    cells = [cell for cell in result.nb.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    errors = [
        (cell.id, output.text)
        for cell in cells
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not errors
    # Bars that are redrawn on a terminal become a line for every time in a notebook.
    assert "\x1b" not in json.dumps([cell.outputs for cell in cells], ensure_ascii=False)
    assert [path.name for path in empty.iterdir()] == [copy.name]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_clean(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    nbformat.validate(notebook)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == METADATA
    assert not any(cell["metadata"] for cell in notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell["id"] for cell in code if cell["outputs"]]
    assert not [cell["id"] for cell in code if cell["execution_count"] is not None]
    # As Jupyter itself writes it, so that saving an unchanged notebook changes nothing.
    assert text == nbformat.writes(nbformat.from_dict(notebook)) + "\n"


def test_a_cell_that_fails_fails_the_notebook(empty: Path, kernel: str) -> None:
    result = run_cell("assert 1 + 1 == 3, 'sums'", empty, kernel)
    assert result.error is not None
    assert "AssertionError" in result.error.summary and "sums" in result.error.summary


def test_the_kernel_is_this_interpreter_and_this_clone(empty: Path, kernel: str) -> None:
    source = "import sys, sa_patch; print(sys.executable); print(sa_patch.__file__)"
    result = run_cell(source, empty, kernel)
    assert result.error is None, result.error.trace
    (output,) = result.nb.cells[0].outputs
    assert output.text.split() == [sys.executable, str(ROOT / "sa_patch" / "__init__.py")]
