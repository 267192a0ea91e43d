"""Scripts run from a fresh clone: what they name is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A path with a folder in front, as in `pytest tests/report/browser`; not `lm-eval/unpack.py`, and
# no path with a placeholder in it.
PATH = re.compile(r"(?<![\w./-])(?:tests|configs|eval|scripts|sa_patch)/[\w./-]+\b(?![*{$<])")


def test_every_path_that_a_script_names_exists() -> None:
    named = {
        (script.name, path)
        for script in [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]
        if script.is_file()
        for path in PATH.findall(script.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    # A user's own folder for a machine.
    named -= {("bench_attention", "eval/results/attention/PROCESSOR")}
    assert {one for one in named if not (ROOT / one[1]).exists()} == set()
