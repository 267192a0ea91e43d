"""A run's folder on disk: what is damaged is said to be."""

from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.training.pretraining.run_folder import RunFolder


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"identity": 1', '{"sessions": []}'])
def test_a_file_without_what_belongs_in_it_is_damaged(text: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("run.json", "result.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="run.json is damaged; delete the run's folder"):
        run.check({"seed": 0})
    with pytest.raises(UserError, match="run.json is damaged"):
        run.begin({"seed": 0}, {})
    with pytest.raises(UserError, match="result.json is damaged"):
        run.headline()
