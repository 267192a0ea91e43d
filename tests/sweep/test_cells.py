"""Cell files: named by what they hold, written whole, trusted only when they prove themselves."""

import json
from pathlib import Path
from typing import Any

import pytest

from sa_patch.files.atomic_write import remove_leftovers, write_json
from sa_patch.patterns import PSA, SA, SWA, Full, MoBA, Sinks
from sa_patch.sweep.cells import (
    SCHEMA,
    cell_id,
    pattern_fields,
    read_cell,
)

CELL = {"model": "m", "pattern": "sa:window=4,seed=0", "task": "needle", "limit": 5}


def finished(**changes: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "id": cell_id(CELL),
        "cell": CELL,
        "status": "done",
        "error": None,
        "scores": {"acc,none": 0.5},
        "primary": {"metric": "acc,none", "value": 0.5},
        "samples": 5,
        "measured": {"sequences": 5},
        **changes,
    }


def test_the_id_depends_on_content_and_not_on_order() -> None:
    assert cell_id(CELL) == cell_id(dict(reversed(CELL.items())))
    assert len(cell_id(CELL)) == 16
    assert len({cell_id({**CELL, key: "other"}) for key in CELL} | {cell_id(CELL)}) == 5


def test_window_and_seed_are_null_where_they_mean_nothing() -> None:
    assert pattern_fields(Full())["window"] is None
    assert pattern_fields(Full())["seed"] is None
    assert pattern_fields(SA(window=8, seed=3))["seed"] == 3
    moba = pattern_fields(MoBA(block_size=16, topk=2))
    assert (moba["window"], moba["seed"], moba["method"]) == (32, None, "moba")


def test_the_seed_of_a_union_is_that_of_its_random_parts() -> None:
    fields = pattern_fields(Sinks(4) | SWA(6) | SA(8, seed=3) | PSA(9, seed=3))
    assert fields == {
        "pattern": "sinks:size=4+swa:window=6+sa:window=8,seed=3+psa:window=9,seed=3",
        "method": "union",
        "window": 27,
        "seed": 3,
    }
    assert pattern_fields(Sinks(4) | SWA(6))["seed"] is None


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    write_json(path, finished())
    assert read_cell(path, CELL).data == finished()
    assert [each.name for each in tmp_path.iterdir()] == ["cell.json"]


def test_no_file_is_no_complaint(tmp_path: Path) -> None:
    found = read_cell(tmp_path / "cell.json", CELL)
    assert found.data is None and found.reason is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_torn_file_is_not_trusted(tmp_path: Path, share: float) -> None:
    path = tmp_path / "cell.json"
    text = json.dumps(finished())
    path.write_text(text[: int(len(text) * share)])
    found = read_cell(path, CELL)
    assert found.data is None
    assert found.reason is not None and "torn" in found.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 0}, "schema 0"),
        ({"cell": {**CELL, "limit": 6}}, "another cell"),
        ({"id": "0" * 16}, "another cell"),
        ({"status": "failed", "error": "boom"}, "failed before: boom"),
        ({"status": "doing"}, "no finished result"),
        ({"primary": None}, "no finished result"),
        ({"primary": {"value": float("nan")}}, "no finite primary score"),
        ({"primary": {"value": True}}, "no finite primary score"),
        ({"measured": None}, "lacks its scores"),
    ],
)
def test_a_file_that_does_not_prove_itself_is_not_trusted(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "cell.json"
    path.write_text(json.dumps(finished(**changes)))
    found = read_cell(path, CELL)
    assert found.data is None
    assert found.reason is not None and reason in found.reason


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "{}", "null"])
def test_a_foreign_file_is_not_trusted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cell.json"
    path.write_text(text)
    assert "not a cell file" in str(read_cell(path, CELL).reason)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    write_json(path, finished())
    with pytest.raises(ValueError):
        write_json(path, finished(scores={"acc,none": float("inf")}))
    assert read_cell(path, CELL).data == finished()
    assert [each.name for each in tmp_path.iterdir()] == ["cell.json"]


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".cell-abc.tmp").write_text("half")
    (tmp_path / "cell.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["cell.json"]
