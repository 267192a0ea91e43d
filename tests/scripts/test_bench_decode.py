"""scripts/bench_decode on a tiny model: a bounded pattern's cache stays flat, the stock grows."""

import json
from pathlib import Path

import pytest

from tests.run_script import refusal, run_script
from tests.tiny_checkpoint import save_tiny_checkpoint


def test_memory_is_flat_for_a_bounded_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(save_tiny_checkpoint(tmp_path / "model"))
    out = tmp_path / "decode.json"
    options = ["--model", checkpoint, "--tokens", "136", "--prompt", "8"]
    options += ["--patterns", "sinks:1+swa:4", "--out", str(out)]
    capfd.readouterr()
    assert run_script("bench_decode", options, monkeypatch) == 0
    assert capfd.readouterr().err == ""
    result = json.loads(out.read_text())
    token_mib = 3 * 2 * 2 * 8 * 4 / 2**20  # layers, keys and values, KV heads, head_dim, bytes
    held = {
        name: [row["kv_mib"] / token_mib for row in runs[0]["along_the_generation"]]
        for name, runs in result["runs"].items()
    }
    assert held == {
        "stock": pytest.approx([72, 136]),
        "sinks:size=1+swa:window=4": pytest.approx([36, 36]),
    }
    assert result["summary"]["stock"]["peak_kv_mib"] == pytest.approx(143 * token_mib)
    assert result["provenance"]["versions"]["torch"]


# What is not refused ends at once.
NO_MODEL = ["--model", "nowhere-to-be-found/at-all"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([*NO_MODEL, "--patterns", "saa"], "unknown method 'saa'"),
        (["--prompt", "768", *NO_MODEL], "--prompt must be from 1 to 767, got 768"),
        (["--rounds", "0", *NO_MODEL], "--rounds must be a whole number of at least 1"),
        (["--threads", "-1", *NO_MODEL], "--threads must be a whole number of at least 1"),
        (["--out", f"{__file__}/decode.json"], "decode.json cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert sentence in refusal("bench_decode", options, monkeypatch, capfd)
