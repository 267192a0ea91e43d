"""scripts/profile_attention, as far as it goes without a GPU."""

import runpy
from collections.abc import Hashable

import pytest
import torch

from sa_patch.kernels.triton import tiles
from sa_patch.patterns import SA
from tests.run_script import SCRIPTS, refusal


def test_new_layers_are_planned_together_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    script = runpy.run_path(str(SCRIPTS / "profile_attention"))
    monkeypatch.setattr(tiles, "_expected_layers", 24)
    planned: list[Hashable] = []
    get = tiles.PLANS.get

    def watched(key: Hashable, build: object) -> object:
        planned.extend(part for part in key if isinstance(part, range))  # type: ignore[attr-defined]
        return get(key, build)  # type: ignore[arg-type]

    monkeypatch.setattr(tiles.PLANS, "get", watched)
    q, k, v = torch.randn(3, 1, 1, 32, 16)
    script["fresh"](q, k, v, SA(8), "triton")
    assert set(planned) == {range(script["LAYERS"])}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "torch sees no CUDA device here"),
        (["--patterns", "saa:16"], "unknown method 'saa'"),
        (["--n", "0"], "n must be a whole number of at least 1"),
        (["--backend", "tritan"], "unknown backend 'tritan'"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sentence in refusal("profile_attention", options, monkeypatch, capfd)
