"""scripts/bench_overhead: figures of few pairs, and one sentence for mistakes."""

import runpy

import pytest

from tests.run_script import SCRIPTS, refusal


def test_a_single_pair_has_figures() -> None:
    figures = runpy.run_path(str(SCRIPTS / "bench_overhead"))["figures"]
    found = figures({"stock": [{"wall": 2.0}], "patched": [{"wall": 3.0}]}, "wall")
    assert (found["median_ratio"], found["quartiles"], found["max"]) == (1.5, [1.5, 1.5], 1.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounds", "0"], "--rounds must be a whole number of at least 1"),
        (["--batch-size", "0"], "--batch-size must be a whole number of at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert sentence in refusal("bench_overhead", options, monkeypatch, capfd)
