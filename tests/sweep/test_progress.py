"""What a sweep shows, and what it keeps off the screen."""

import io
import logging
import sys

import pytest
from rich.console import Console

from sa_patch.models.quiet_output import KEPT_LINES, CapturedOutput, silenced
from sa_patch.sweep.progress import SweepProgress, TimeLeft, duration_text, outcome_text


def test_time_left_goes_task_by_task() -> None:
    left = TimeLeft(["fast", "fast", "slow", "slow"])
    assert left.seconds() is None
    left.finished("fast", 1.0)
    assert left.seconds() == pytest.approx(3.0)
    left.finished("slow", 9.0)
    assert left.seconds() == pytest.approx(1.0 + 9.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3.2 s"), (12.3, "12 s"), (240.0, "4 min"), (12000.0, "3 h 20 min")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_without_a_terminal_there_is_one_plain_line_per_cell() -> None:
    stream = io.StringIO()
    with SweepProgress(["a", "a"], Console(file=stream, force_terminal=False)) as progress:
        progress.starts("a  full")
        progress.finished("a", "a  full", "acc 0.5", 2.0)
        progress.finished("a", "a  swa:window=4", "acc 0.25", 2.0)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "[1/2]  a  full  acc 0.5  2.0 s  about 2.0 s left",
        "[2/2]  a  swa:window=4  acc 0.25  2.0 s",
    ]


def test_in_a_notebook_the_lines_go_to_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    # A notebook's streams pass for a terminal, on which a bar would be drawn.
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with SweepProgress(["a"]) as progress:
        progress.starts("a  full")
        progress.finished("a", "a  full", "acc 0.5", 2.0)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("[1/1]  a  full  acc 0.5  2.0 s\n", "")


def test_elsewhere_the_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with SweepProgress(["a"]) as progress:
        progress.finished("a", "a  full", "acc 0.5", 2.0)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "[1/1]  a  full  acc 0.5  2.0 s\n")


def test_a_score_with_and_without_its_error() -> None:
    primary = {"metric": "acc_norm,none", "value": 0.3625, "stderr": 0.0541}
    assert outcome_text(primary) == "acc_norm 0.3625 ± 0.054"
    assert outcome_text({**primary, "stderr": None}) == "acc_norm 0.3625"


def test_output_is_kept_and_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with silenced() as output:
        print("printed")
        print("bar 1%\rbar 100%", file=sys.stderr)
        logging.getLogger("transformers.models").warning("logged")
        logging.getLogger("lm_eval").error("evaluated")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    for word in ("printed", "bar 100%", "logged", "evaluated"):
        assert word in output.text()
    assert "bar 1%" not in output.text()


def test_logging_is_as_before_afterwards() -> None:
    logger = logging.getLogger("lm_eval")
    before = (logger.handlers[:], logger.propagate)
    with pytest.raises(RuntimeError), silenced():
        raise RuntimeError
    assert (logger.handlers, logger.propagate) == before


def test_endless_output_takes_little_memory() -> None:
    output = CapturedOutput()
    for index in range(10 * KEPT_LINES):
        output.write(f"line {index}\n")
    assert len(output.text().splitlines()) == KEPT_LINES
