"""One tiny checkpoint for all tests of the harness."""

from pathlib import Path

import pytest

from tests.tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
