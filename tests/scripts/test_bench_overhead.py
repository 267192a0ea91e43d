"""scripts/bench_overhead: figures of few pairs, and one sentence for mistakes."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from sa_patch.patching.attention import OWN_NAMES
from tests.run_script import SCRIPTS, refusal, run_script


def test_a_single_round_has_figures() -> None:
    figures = runpy.run_path(str(SCRIPTS / "bench_overhead"))["figures"]
    found = figures({"stock": [{"wall": 2.0}], "patched": [{"wall": 3.0}]}, "patched", "wall")
    assert (found["median_ratio"], found["quartiles"], found["max"]) == (1.5, [1.5, 1.5], 1.5)


def test_patched_and_stock_run_the_same_code(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "overhead.json"
    given = ["--model", str(checkpoint), "--rounds", "1", "--documents", "1", "--out", str(out)]
    read: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}
    call = HFLM._model_call

    def counted(self: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        if type(self) is HFLM:
            own = self.model.config._attn_implementation in OWN_NAMES
            read[own].append(tuple(inputs.shape))
        return call(self, inputs, *rest, **named)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    assert run_script("bench_overhead", given, monkeypatch) == 0
    assert read[True] and read[True] == read[False]
    result = json.loads(out.read_text())
    assert result["largest_score_difference"]["patched"] < 1e-4
    assert {
        len(result[name][clock]["ratios"])
        for name in ("patched", "sa-patch")
        for clock in ("wall", "cpu")
    } == {1}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounds", "0"], "--rounds must be a whole number of at least 1"),
        (["--batch-size", "0"], "--batch-size must be a whole number of at least 1"),
        (["--model", "NOWHERE"], "the model 'NOWHERE' could not be loaded"),
        (["--dtype", "float8"], "could not be loaded"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert sentence in refusal("bench_overhead", options, monkeypatch, capfd)
