"""What makes two cells of a sweep different ones, and that their names stay."""

import json
from pathlib import Path

from sa_patch.files.packed import stored_files, stored_text
from sa_patch.patterns import parse_pattern
from sa_patch.sweep.cells import cell_id, pattern_fields
from sa_patch.sweep.plan import make_plan
from sa_patch.sweep.run import describe_plan
from tests.sweep.small_sweep import results, run, sweep_of


def test_a_changed_model_or_limit_is_another_cell(checkpoint: Path, tmp_path: Path) -> None:
    from tests.tiny_checkpoint import save_tiny_checkpoint

    other = save_tiny_checkpoint(tmp_path / "other", family="qwen3")
    plans = [
        make_plan(sweep_of(checkpoint)),
        make_plan(sweep_of(checkpoint, limit=3)),
        make_plan(sweep_of(checkpoint, decode="pattern")),
        make_plan(sweep_of(checkpoint, layers=[0])),
        make_plan(sweep_of(other)),
    ]
    identifiers = [cell.id for plan in plans for cell in plan.cells]
    assert len(set(identifiers)) == len(identifiers) == 25


def test_the_resources_of_a_worker_are_no_part_of_a_cell(checkpoint: Path) -> None:
    rich = make_plan(sweep_of(checkpoint, resources={"cpus": 8, "gpus": 2}))
    plain = make_plan(sweep_of(checkpoint))
    assert [cell.id for cell in rich.cells] == [cell.id for cell in plain.cells]


def test_layers_belong_to_cells(checkpoint: Path, tmp_path: Path) -> None:
    methods = ["full", "swa", {"method": "swa", "layers": {1: "full"}}]
    config = sweep_of(checkpoint, methods=methods)
    assert run(config, tmp_path / "run").exit_status == 0
    cells = [content["cell"] for content in results(tmp_path / "run").values()]
    assert {(cell["method"], json.dumps(cell["layers"])) for cell in cells} == {
        ("full", "null"),
        ("swa", "null"),
        ("swa", '{"1": "full"}'),
    }
    measured = {
        json.dumps(content["cell"]["layers"]): content["measured"]["mean_keys_per_query"]
        for content in results(tmp_path / "run").values()
        if content["cell"]["method"] == "swa"
    }
    assert measured['{"1": "full"}'] > 1.5 * measured["null"]
    plain = make_plan(sweep_of(checkpoint, methods=["full", "swa"]))
    assert {cell.id for cell in plain.cells} < {cell.id for cell in make_plan(config).cells}
    lines = describe_plan(make_plan(config), tmp_path / "run")
    assert any(line.endswith("swa:window=16  layers 1: full  limit=2") for line in lines)


def test_cells_keep_the_names_they_had(checkpoint: Path) -> None:
    """A published run is found again: nothing may enter a cell's identity that was not there."""
    folder = Path(__file__).parents[2] / "eval" / "results" / "smollm2-135m"
    cells = [json.loads(stored_text(path)) for path in stored_files(folder / "cells")]
    assert len(cells) > 100
    for content in cells:
        fields = pattern_fields(parse_pattern(content["cell"]["pattern"]))
        assert cell_id({**content["cell"], **fields}) == content["id"]
    plan = make_plan(sweep_of(checkpoint, layers="0-1"))
    known = set(cells[0]["cell"])
    assert all(set(cell.cell) == known and cell.cell["layers"] == [0, 1] for cell in plan.cells)


def test_settings_of_prompts_are_part_of_a_cell_where_they_are_given(checkpoint: Path) -> None:
    plain = make_plan(sweep_of(checkpoint)).cells
    given = {
        "metadata": {"needle_documents": 3},
        "apply_chat_template": True,
        "system_instruction": "Be brief.",
        "truncation": "middle",
        "max_prompt_tokens": 64,
    }
    seen = {cell.id for cell in plain}
    for key, value in given.items():
        cells = make_plan(sweep_of(checkpoint, **{key: value})).cells
        assert [cell.cell[key] for cell in cells] == [value] * len(plain)
        assert all(
            cell.cell == {**old.cell, key: value} for cell, old in zip(cells, plain, strict=True)
        )
        seen |= {cell.id for cell in cells}
    assert len(seen) == (1 + len(given)) * len(plain)


def test_each_length_is_a_cell(checkpoint: Path) -> None:
    tasks = [{"task": "needle", "metadata": {"max_seq_lengths": [1024, 4096]}}]
    plan = make_plan(sweep_of(checkpoint, methods=["full"], tasks=tasks))
    found = [(cell.info.name, cell.cell["metadata"]["max_seq_lengths"]) for cell in plan.cells]
    names = ["needle_128", "needle_256", "needle_512", "needle_1024"]
    assert found == [(name, [length]) for length in (1024, 4096) for name in names]


def test_a_renamed_task_goes_on_with_its_old_cells(checkpoint: Path) -> None:
    old, new = (
        make_plan(sweep_of(checkpoint, tasks=[name]))
        for name in ("passkey_512", "recall_passkey_512")
    )
    assert [cell.id for cell in old.cells] == [cell.id for cell in new.cells]
    assert {cell.cell["task"] for cell in new.cells} == {"passkey_512"}
    assert {cell.info.name for cell in old.cells} == {"recall_passkey_512"}
