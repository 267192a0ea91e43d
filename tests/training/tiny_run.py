"""Trainings of seconds: a YAML file with its text, and scripts in this process."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sa_patch.training.pretraining.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
_LABELLED = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
---
"""


def write_config(folder: Path, **changes: Any) -> Path:
    """A file of settings; `changes` go over its top-level keys, None takes one away."""
    text = folder / "text.jsonl"
    rows = [{"text": f"value {i} of {i * i % 97} is not {i % 7}\n" * 8} for i in range(480)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model": {"layers": 2, "hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 24},
        "text": {
            "source": "json",
            "data_files": str(text),
            "vocabulary": 512,
            "validation_tokens": 256,
        },
        "recall": {"share": 0.5, "documents": 4, "weight": 3},
        "sequence": 64,
        "window": 8,
        "batch": 4,
        "micro_batch": 2,
        "steps": 12,
        "warmup": 2,
        "learning_rate": 0.01,
        "checkpoint_every": 3,
        "validate_every": 6,
        "log_every": 1,
    }
    settings |= changes
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
    return path


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    """Those of the trained model of a run."""
    found: dict[str, torch.Tensor] = load_file(run.model / "model.safetensors")
    return found


def write_labelled_texts(folder: Path) -> Path:
    """A data set whose labels depend on one word of each text, and on nothing else."""
    path = folder / "mini"
    path.mkdir()
    (path / "README.md").write_text(_LABELLED)
    for split, count in (("train", 160), ("test", 40)):
        rows = [
            {"text": f"{'Good' if i % 2 else 'bad'} " + "x y " * (i % 5), "label": "ab"[i % 2]}
            for i in range(count)
        ]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_here(script: str, *options: str, cwd: Path, status: int = 0) -> str:
    """Output of a script that ends with `status`, in this process, with nothing imported again."""
    path, out = ROOT / "scripts" / script, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(path), *options])
        patch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == status
    return out.getvalue()
