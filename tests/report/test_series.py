"""Names of what is compared: which patterns are one series, and what it is called."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from sa_patch.report.aggregate import Comparison, compare
from sa_patch.report.series import strip_parameters
from sa_patch.sweep.results import load_run
from tests.sweep.run_builder import RunBuilder


def compared(builder: RunBuilder) -> Comparison:
    return compare(load_run(builder.write()).cells)


def labels_of(tmp_path: Path, patterns: Mapping[str, int], task: str = "hellaswag") -> list[str]:
    """The series' labels of a run with these patterns, given with their windows."""
    builder = RunBuilder(tmp_path / "run")
    for text, window in patterns.items():
        method = "union" if "+" in text else text.split(":")[0]
        builder.add(text, task, 0.3, window=window, method=method)
    return [series.label for series in compared(builder).series]


def union(window: int, near: int, seed: int = 0) -> str:
    return f"sinks:size=4+swa:window={near}+sa:window={window - 4 - near},seed={seed}"


def test_a_union_that_grows_in_all_its_parts_is_one_series(tmp_path: Path) -> None:
    patterns = {union(w, (w - 4) // 2, seed): w for w in (32, 64, 128) for seed in (0, 1)}
    patterns |= {"sinks:size=4+swa:window=124": 128, "sinks:size=8+swa:window=120": 128}
    assert labels_of(tmp_path, patterns) == ["sinks 4 + SWA", "sinks 4 + SWA + SA", "sinks 8 + SWA"]


def test_two_splits_of_one_window_are_not_taken_for_seeds(tmp_path: Path) -> None:
    patterns = {union(w, round(share * (w - 4))): w for w in (32, 64) for share in (0.25, 0.75)}
    assert labels_of(tmp_path, patterns) == [
        "sinks 4 + SWA 25% + SA 75%",
        "sinks 4 + SWA 75% + SA 25%",
    ]


def test_two_patterns_that_shares_cannot_tell_apart_are_spelt_out(tmp_path: Path) -> None:
    patterns = {union(128, 60): 128, union(128, 62): 128, union(128, 62, seed=1): 128}
    assert labels_of(tmp_path, patterns) == [
        "sinks 4 + SWA 60 + SA 64",
        "sinks 4 + SWA 62 + SA 62",
    ]


def test_block_choice_is_one_series_until_one_budget_means_two_patterns(tmp_path: Path) -> None:
    blocks = "block_topk:block_size={},topk={},sinks=4,local={}"
    grown = {blocks.format(4, 4, 8): 32, blocks.format(8, 6, 16): 76}
    assert labels_of(tmp_path, grown) == ["BlockTopK (sinks=4)"]
    rivals = {blocks.format(4, 8, 8): 48, blocks.format(8, 4, 8): 48}
    assert labels_of(tmp_path / "rivals", rivals) == [
        "BlockTopK (block_size=4, sinks=4)",
        "BlockTopK (block_size=8, sinks=4)",
    ]


def test_small_blocks_in_a_union_are_one_series_unless_they_differ_in_size(tmp_path: Path) -> None:
    blocks = "sinks:size=4+moba:block_size={},topk={}"
    assert labels_of(tmp_path, {blocks.format(8, 4): 36, blocks.format(8, 8): 68}) == [
        "sinks 4 + MoBA"
    ]
    rivals = {blocks.format(8, 8): 68, blocks.format(16, 4): 68, blocks.format(16, 8): 132}
    assert labels_of(tmp_path / "rivals", rivals) == [
        "sinks 4 + MoBA (block_size=16)",
        "sinks 4 + MoBA (block_size=8)",
    ]


def test_one_window_on_two_tasks_may_stand_for_two_patterns(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for near, task in ((60, "hellaswag"), (62, "boolq")):
        builder.add(union(128, near), task, 0.3, window=128, method="union")
    assert [series.label for series in compared(builder).series] == ["sinks 4 + SWA + SA"]


def test_layers_of_their_own_make_series_with_short_different_names(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("full", "hellaswag", 0.36)
    for odd in (1, 3):
        layers = {",".join(map(str, range(odd, 30, 2))): "full"}
        builder.add("swa:window=16", "hellaswag", 0.3, layers=layers)
    builder.add("swa:window=16", "hellaswag", 0.3)
    builder.add("swa:window=16", "hellaswag", 0.3, layers=[0, 1, 2, 3, 7])
    labels = [series.label for series in compared(builder).series]
    assert len(set(labels)) == 5 and max(map(len, labels)) <= 50
    assert {"SWA", "SWA, layers 0-3,7"} < set(labels)


@pytest.mark.parametrize(
    ("pattern", "names", "expected"),
    [
        ("sa:window=64,seed=0", ("window", "seed"), "sa"),
        ("sa:window=64,seed=0", ("seed",), "sa:window=64"),
        ("sa:seed=0,window=64", ("window",), "sa:seed=0"),
        ("moba:block_size=32,topk=2", ("window", "block_size"), "moba:topk=2"),
        ("mix(swa:window=8+sa:window=8,seed=0)", ("window", "seed"), "mix(swa+sa)"),
        ("full", ("window",), "full"),
    ],
)
def test_strip_parameters(pattern: str, names: tuple[str, ...], expected: str) -> None:
    assert strip_parameters(pattern, names) == expected
