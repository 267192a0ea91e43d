"""Commands in processes of their own that start with the heavy libraries imported.

Importing torch, transformers and lm-eval takes most commands longer than what a test asks of them.
So a fork server imports them once for all tests, and nothing of `sa_patch`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3.modeling_qwen3",
        "lm_eval.evaluator",
        "lm_eval.models.huggingface",
    ]
)


class Command:
    """``python`` with words, started: ``-m`` and a module, or ``-c`` and a program, or a script.

    Args:
        cwd: the folder it starts in, and finds modules in first.
        environment: what is changed of this process's.
    """

    def __init__(
        self,
        *words: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._shown = [Path(self._folder.name, name) for name in ("out", "err")]
        self._words = words
        settings = (words, cwd or Path.cwd(), {**os.environ, **environment}, self._shown)
        self.process = FORK_SERVER.Process(target=_run, args=settings)
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """What it printed and its status; it is killed when the time is up."""
        self.process.join(seconds)
        self.kill()
        out, err = (path.read_text(encoding="utf-8") for path in self._shown)
        status = self.process.exitcode
        assert status is not None
        return subprocess.CompletedProcess(self._words, status, out, err)


def run(
    *words: str, cwd: Path | None = None, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """What a `Command` prints, and its status."""
    return Command(*words, cwd=cwd, environment=environment).wait()


def launch_two(*words: str, cwd: Path) -> str:
    """What a command prints in two processes together, as `accelerate launch` starts them.

    It must succeed in both.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    commands = [
        Command(*words, cwd=cwd, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    ended = [command.wait() for command in commands]
    for one in ended:
        assert one.returncode == 0, one.stderr[-3000:]
    return "".join(one.stdout for one in ended)


def _run(
    words: tuple[str, ...], cwd: Path, environment: Mapping[str, str], shown: list[Path]
) -> None:
    for stream, path in enumerate(shown, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    # This module was imported to be here; the command may mean other tests, in its own folder.
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(cwd), *(path for path in paths if path)]
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
