"""Commands in two processes on the CPU, with the environment that `accelerate launch` gives."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch_two(*command: str, cwd: Path) -> str:
    """What a script with its arguments, or ``-m`` and a module, prints; it must succeed."""
    # Without the launcher itself, whose imports would take longer than the work.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, ended, strict=True):
        assert process.returncode == 0, err[-3000:]
    return "".join(out for out, _ in ended)
