"""Commands in two processes on the CPU, as `accelerate launch` starts them."""

import os
import subprocess
import sys
from pathlib import Path


def launch_two(*command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """A script with its arguments, or ``-m`` and a module; it must succeed."""
    # Under --cpu accelerate starts one process whatever is asked; --multi_gpu starts them all, and
    # ACCELERATE_USE_CPU keeps them on the CPU.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launcher, *command],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
