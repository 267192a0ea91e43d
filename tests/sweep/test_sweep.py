"""A sweep from end to end on a tiny random model: scores, manifest, order, and clear mistakes."""

import dataclasses
import json
from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.evaluation import scoring
from sa_patch.patterns import SA
from sa_patch.sweep.cell_runner import load_model
from sa_patch.sweep.cells import cell_id
from sa_patch.sweep.plan import make_plan
from tests.sweep.small_sweep import results, run, sweep_of


def test_every_cell_has_its_scores_and_measurements(unbroken: Path) -> None:
    cells = results(unbroken)
    assert len(cells) == 5
    for name, content in cells.items():
        assert name == f"{content['id']}.json" == f"{cell_id(content['cell'])}.json"
        assert (content["status"], content["error"], content["samples"]) == ("done", None, 2)
        assert content["primary"]["metric"] == "acc,none"
        assert content["primary"]["value"] == content["scores"]["acc,none"]
        assert content["primary"]["chance"] == 0.125
        (items,) = content["items"].values()
        assert len(items) == 2 and sum(items) / 2 == content["primary"]["value"]
        assert content["measured"]["tokens"] > 0
        # `auto` was asked for; prompts are short, and this is what served them.
        assert set(content["measured"]["backends"]) <= {"reference", "banded"}
        assert sum(content["measured"]["backends"].values()) > 0
    sa = next(c for c in cells.values() if c["cell"]["pattern"] == "sa:window=16,seed=1")
    assert sa["cell"] | {"window": 16, "seed": 1, "method": "sa", "limit": 2} == sa["cell"]
    assert 1 < sa["measured"]["mean_keys_per_query"] < 32


def test_the_manifest_tells_what_was_done(unbroken: Path) -> None:
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert {f"{identifier}.json" for identifier in manifest["planned"]} == set(results(unbroken))
    assert manifest["config"]["patterns"][0] == "full"
    assert manifest["ended"] is not None and manifest["versions"]["torch"]
    assert [session["ran"] for session in manifest["sessions"]] == [5]


def test_a_sweep_scores_as_lm_evals_own_command_does(checkpoint: Path, unbroken: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from sa_patch.files.packaged import tasks_dir

    config = sweep_of(checkpoint)
    lm = load_model(config.models[0], 4)
    lm.use_pattern(SA(window=16, seed=1))
    manager = TaskManager(include_path=tasks_dir(), include_defaults=False)
    theirs = lm_eval.simple_evaluate(lm, tasks=["needle_128"], limit=2, task_manager=manager)
    ours = next(
        content
        for content in results(unbroken).values()
        if content["cell"]["pattern"] == "sa:window=16,seed=1"
    )
    for metric, value in ours["scores"].items():
        assert theirs["results"]["needle_128"][metric] == pytest.approx(value, abs=1e-12)


def test_full_attention_and_first_seeds_come_first(checkpoint: Path) -> None:
    plan = make_plan(sweep_of(checkpoint, tasks=["needle_128", "needle_256"]))
    order = [(cell.info.name, str(cell.pattern)) for cell in plan.cells]
    assert order[0] == ("needle_128", "full")
    assert order[4] == ("needle_128", "sa:window=16,seed=1")
    assert order[5] == ("needle_256", "full")


def test_layers_that_the_model_lacks_are_the_users_to_mend(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"layers \[7\]"):
        run(sweep_of(checkpoint, layers=[0, 7]), tmp_path / "run")
    assert results(tmp_path / "run") == {}


def test_a_model_that_does_not_load_is_one_sentence(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "model").mkdir()
    for path in checkpoint.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model" / "config.json").write_text('{"model_type": "frobnicator"}')
    with pytest.raises(UserError, match="could not be loaded") as caught:
        run(sweep_of(tmp_path / "model"), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_scores_that_are_not_finite_fail_their_cell(checkpoint: Path) -> None:
    info = make_plan(sweep_of(checkpoint)).cells[0].info
    with pytest.raises(ValueError, match="acc,none is not a finite number"):
        scoring.primary_score({}, info, {"acc,none": None})
    with pytest.raises(ValueError, match="no metric 'f1', only acc,none"):
        other = dataclasses.replace(info, primary_metric="f1")
        scoring.primary_score({}, other, {"acc,none": 0.5, "acc_stderr,none": 0.1})
