"""A finished sweep, for the tests of a module to read, copy and go on with."""

from pathlib import Path

import pytest

from tests.sweep.small_sweep import run, sweep_of


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing disturbed."""
    out = tmp_path_factory.mktemp("sweep") / "run"
    outcome = run(sweep_of(checkpoint), out)
    assert (outcome.exit_status, outcome.ran) == (0, 5)
    return out
