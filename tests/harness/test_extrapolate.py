"""What a whole sweep would take, from a small one."""

from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.harness.extrapolate import WHOLE_ITEMS, extrapolate, read_items
from sa_patch.harness.results import load_run
from tests.harness.run_builder import RunBuilder


def test_time_and_tokens_grow_with_the_items(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for window, seconds in ((16, 10.0), (32, 30.0)):
        identifier = builder.add(f"swa:window={window}", "boolq", 0.5, samples=20)
        builder.files[identifier]["seconds"] = seconds
    builder.add("swa:window=16", "needle", 0.5, samples=50)
    boolq, needle = extrapolate(load_run(builder.write()).cells, {"needle": 500})
    assert (boolq.task, boolq.cells, boolq.sampled) == ("boolq", 2, 20)
    assert boolq.items == WHOLE_ITEMS["boolq"] == 3270
    assert boolq.hours == pytest.approx((10 + 30) / 20 * 3270 / 3600)
    # 200 sequences of 150 tokens for 20 items.
    assert boolq.tokens == pytest.approx(200 * 150 / 20 * 3270)
    assert needle.hours == pytest.approx(12.3 / 50 * 500 / 3600)


def test_models_are_kept_apart(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for name in ("a", "b"):
        builder.add("swa:window=16", "boolq", 0.5, model_name=name)
    costs = extrapolate(load_run(builder.write()).cells, {"boolq": 50})
    assert [(cost.model, cost.cells) for cost in costs] == [("a", 1), ("b", 1)]
    assert [cost.hours for cost in costs] == [pytest.approx(12.3 / 3600)] * 2


def test_what_is_not_known_is_asked_for(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("swa:window=16", "needle", 0.5)
    cells = load_run(builder.write()).cells
    with pytest.raises(UserError, match="--items needle=NUMBER"):
        extrapolate(cells, {})
    builder.add("swa:window=16", "boolq", 0.5, samples=None)
    with pytest.raises(UserError, match="boolq has no time or no number of items"):
        extrapolate(load_run(builder.write()).cells, {"needle": 5})


def test_items_are_read_as_pairs() -> None:
    assert read_items(["a=3", "b_c=14042"]) == {"a": 3, "b_c": 14042}
    for text in ("a", "a=", "=3", "a=x", "a=0", "a=-1"):
        with pytest.raises(UserError, match="--items takes TASK=NUMBER"):
            read_items([text])
