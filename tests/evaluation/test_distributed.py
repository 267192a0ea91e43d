"""One evaluation spread over two processes, as `accelerate launch` starts them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.processes import launch_two

ROOT = Path(__file__).parents[2]


def evaluate(checkpoint: Path, folder: Path) -> None:
    """Write what this process has of an evaluation to ``rankN.json``."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from sa_patch.evaluation.lm_eval_model import SAPatchLM
    from sa_patch.files.packaged import tasks_dir

    lm = SAPatchLM(str(checkpoint), method="sa", window=16, seed=1, dtype="float32", batch_size=4)
    results = simple_evaluate(
        model=lm,
        tasks=["needle_128"],
        limit=10,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks_dir()), include_defaults=False),
    )
    samples = results and sorted(results["samples"]["needle_128"], key=lambda one: one["doc_id"])
    report = {
        "sequences": lm.meter.summary()["sequences"],
        "results": results and results["results"]["needle_128"],
        "likelihoods": results
        and [float(answer[0][0]) for one in samples for answer in one["resps"]],
    }
    Path(folder, f"rank{lm.rank}.json").write_text(json.dumps(report))


def test_two_processes_share_the_work_and_give_the_scores_of_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    launch_two("-m", "tests.evaluation.test_distributed", str(checkpoint), str(tmp_path), cwd=ROOT)
    first, second = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json")))
    evaluate(checkpoint, tmp_path)
    one = json.loads((tmp_path / "rank0.json").read_text())
    assert first["results"] == one["results"]
    # Ten documents with eight choices each.
    assert len(one["likelihoods"]) == 80
    assert first["likelihoods"] == pytest.approx(one["likelihoods"], abs=1e-4)
    assert second["results"] is None
    assert one["sequences"] == 10
    assert first["sequences"] == second["sequences"] == 5


if __name__ == "__main__":
    evaluate(Path(sys.argv[1]), Path(sys.argv[2]))
