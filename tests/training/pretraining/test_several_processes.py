"""Two processes that share the batches of a run end with the weights of one."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from sa_patch.training.pretraining.run_folder import RunFolder
from tests.training.pretraining.tiny_run import ROOT, run, write_config
from tests.two_processes import launch_two

TOLERANCE = 1e-4  # absolute, float32: sums of gradients in another order


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model" / "model.safetensors")
    return found


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, steps=4))
    status, _, errors = run("pretrain", config, "--method", "swa", "--out", "one", cwd=tmp_path)
    assert status == 0, errors
    script = str(ROOT / "scripts" / "pretrain")
    done = launch_two(script, config, "--method", "swa", "--out", "two", cwd=tmp_path)
    assert done.stdout.count("validation perplexity") == 1
    one, two = (RunFolder(tmp_path / name).result() for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["recall"]["questions"] == one["recall"]["questions"]
    assert abs(two["validation_loss"] - one["validation_loss"]) < TOLERANCE
    alone, shared = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        assert (shared[name] - value).abs().max() < TOLERANCE, name
