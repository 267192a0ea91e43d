"""scripts/bench_fractional: one length is enough, and a mistake is one sentence."""

import json
from pathlib import Path

import pytest

from tests.run_script import refusal, run_script


def test_what_has_one_length_has_no_exponent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--n", "96,128", "--window", "16", "--dense-up-to", "96", "--rounds", "1"]
    assert run_script("bench_fractional", [*given, "--out", str(tmp_path)], monkeypatch) == 0
    assert capfd.readouterr().err == ""
    found = json.loads((tmp_path / "fractional_time.json").read_text())
    assert [list(times) for times in found["seconds"].values()] == 3 * [["96", "128"]] + [["96"]]
    assert list(found["growth"]) == list(found["seconds"])[:3]
    assert (tmp_path / "fractional_time.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--n", "0"], "--n must be a whole number of at least 2, got 0"),
        (["--rounds", "0"], "--rounds must be a whole number of at least 1"),
        (["--head-dim", "0"], "--head-dim must be a whole number of at least 1"),
        (["--threads", "0"], "--threads must be a whole number of at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(
    given: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert says in refusal("bench_fractional", given, monkeypatch, capfd)
