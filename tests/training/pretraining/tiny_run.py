"""A training run of seconds: its YAML file and a text of a few hundred tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]


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


def start(script: str, *options: str, cwd: Path) -> subprocess.Popen[str]:
    """A script of ours in a process of its own, offline and on one thread."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / script), *options],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *options: str, cwd: Path) -> tuple[int, str, str]:
    """Exit status, output and errors of `start`."""
    process = start(script, *options, cwd=cwd)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors
