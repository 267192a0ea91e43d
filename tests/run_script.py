"""Runs scripts within this process, where nothing has to be imported again."""

import logging
import runpy
import signal
import sys
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def run_script(script: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The status that a script ends with."""
    path = SCRIPTS / script
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    monkeypatch.setattr(sys, "path", [*sys.path])
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        # Scripts silence their own process, and say what ends it.
        signal.signal(signal.SIGTERM, terminated)
        logging.disable(logging.NOTSET)
        transformers_logging.enable_progress_bar()
    return 0


def refusal(
    script: str,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> str:
    """What a script says of bad input: one line on standard error and nothing else, status 2."""
    assert run_script(script, options, monkeypatch) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line
