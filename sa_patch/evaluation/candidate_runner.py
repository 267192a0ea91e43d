"""Run by `code_eval` as a process of its own, never imported: executes one candidate program.

Arguments: the program's file, the file descriptor for reports, MiB of memory, MiB per file. The
line to report when the program reached its end comes on standard input.
"""

import builtins
import contextlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

MIB = 2**20
OS_FUNCTIONS = """
    kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames
    truncate replace unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir
"""


def limit_resources(memory_mb: int, file_mb: int) -> None:
    for kind, amount in (
        (resource.RLIMIT_AS, memory_mb * MIB),
        (resource.RLIMIT_DATA, memory_mb * MIB),
        (resource.RLIMIT_FSIZE, file_mb * MIB),
        (resource.RLIMIT_CORE, 0),
    ):
        # macOS refuses some of these; the time limit still holds there.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (amount, amount))


def disable_destructive_functions() -> None:
    """The list of the HumanEval harness: what a wrong program might do harm with by accident."""
    for name in OS_FUNCTIONS.split():
        setattr(os, name, None)
    for name in ("rmtree", "move", "chown"):
        setattr(shutil, name, None)
    setattr(subprocess, "Popen", None)  # noqa: B010 (an assignment is a type error)
    for name in ("exit", "quit", "help"):
        setattr(builtins, name, None)
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None  # type: ignore[assignment]


def main() -> None:
    program, reports = Path(sys.argv[1]).read_text(encoding="utf-8"), int(sys.argv[2])
    passed_line = sys.stdin.buffer.readline()
    limit_resources(memory_mb=int(sys.argv[3]), file_mb=int(sys.argv[4]))
    disable_destructive_functions()
    os.write(reports, b"started\n")
    exec(compile(program, "<candidate>", "exec", dont_inherit=True), {})
    os.write(reports, passed_line)
    # Not a return: threads that the candidate left running must not hold up its pass.
    os._exit(0)


main()
