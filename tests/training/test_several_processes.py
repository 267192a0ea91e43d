"""Processes started together share the work of a run, and end with what one process does.

Both scripts run in one launch, since starting processes takes longer than the training.
"""

import json
from pathlib import Path

from sa_patch.training.pretraining.loop import pretrain
from sa_patch.training.pretraining.methods import Method
from sa_patch.training.pretraining.run_folder import RunFolder
from sa_patch.training.pretraining.settings import load_settings
from tests.processes import launch_two
from tests.training.tiny_run import ROOT, weights, write_config, write_labelled_texts

TOLERANCE = 1e-4  # absolute, float32: sums of gradients in another order
# Runs scripts one after another, as `accelerate launch` runs one.
LAUNCHED = """
import json, runpy, sys

for script, *options in json.loads(sys.argv[1]):
    sys.argv = [script, *options]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def test_two_processes_learn_what_one_does_and_share_trials(tmp_path: Path) -> None:
    # Of one recall document the second process has no share.
    config = write_config(tmp_path, steps=4, recall={"share": 0.5, "documents": 1, "weight": 3})
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    commands = [
        ["pretrain", str(config), "--method", "swa", "--out", "two", "--corpus", "corpus"],
        ["classify", str(write_labelled_texts(tmp_path)), "--attention", "dot,1.2"]
        + ["--head-dim", "4", "--trials", "2", "--epochs", "2", "--choosing", "1", "--batch", "8"]
        + ["--max-length", "16", "--out", "classified"],
    ]
    paths = [[str(ROOT / "scripts" / name), *options] for name, *options in commands]
    printed = launch_two(str(script), json.dumps(paths), cwd=tmp_path)

    assert printed.count("validation perplexity") == 1
    settings = load_settings(config)
    method = Method.read("swa", settings.window)
    alone = pretrain(settings, method, 0, tmp_path / "one", tmp_path / "corpus", ["test"])
    shared = RunFolder(tmp_path / "two")
    one, two = alone.result(), shared.result()
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["recall"]["questions"] == one["recall"]["questions"]
    assert abs(two["validation_loss"] - one["validation_loss"]) < TOLERANCE
    expected, found = weights(alone), weights(shared)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < TOLERANCE, name

    # Each trial was trained once, and one table was written.
    said = [line.split(": ")[-1] for line in printed.splitlines() if line.endswith(".json")]
    assert len(said) == len(set(said)) == 9
    names = {path.name for path in (tmp_path / "classified" / "trials").iterdir()}
    assert set(said) == names | {"classified/classification.json"}
