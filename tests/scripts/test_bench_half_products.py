"""scripts/bench_half_products: torch's linear layers beside ours, once both are right."""

import json
from pathlib import Path

import pytest

from sa_patch.models.half_products import WidenedLinear
from tests.run_script import refusal, run_script


def test_every_case_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "times.json"
    given = ["--rows", "1", "8", "--rounds", "1", "--out", str(out)]
    assert run_script("bench_half_products", given, monkeypatch) == 0
    records = json.loads(out.read_text())["records"]
    assert len({(one["dtype"], *one["shape"], one["rows"]) for one in records}) == 2 * 3 * 2
    assert all(len(one["seconds"]) == 3 and min(one["seconds"].values()) > 0 for one in records)


def test_wrong_products_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forward = WidenedLinear.forward
    monkeypatch.setattr(WidenedLinear, "forward", lambda self, x: 1.1 * forward(self, x))
    assert run_script("bench_half_products", ["--rows", "8", "--rounds", "1"], monkeypatch) == 2
    assert "off by" in capfd.readouterr().err


def test_bad_numbers_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for given in (["--rounds", "0"], ["--rows", "0"]):
        assert "at least 1" in refusal("bench_half_products", given, monkeypatch, capfd)
