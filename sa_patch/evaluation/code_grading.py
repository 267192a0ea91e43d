"""Offline pass@k for generated code, in the manner of the HumanEval harness.

lm-eval's code tasks (humaneval, mbpp) load the metric "code_eval" from the hub. This module
grades the same way with no download: each candidate runs with its tests in a Python process of its
own, in a temporary working directory, under limits of time and memory, and passes only if it gets
to the end. Method and estimator: Chen et al., "Evaluating Large Language Models Trained on Code"
(arXiv 2107.03374), section 2.1.

This keeps accidents in check; it is no sandbox against code that means harm.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError

CANDIDATE_RUNNER = Path(__file__).with_name("candidate_runner.py")
STARTED = b"started\n"
# Getting a Python process to its first line is not the candidate's time, however busy the machine.
START_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """What one candidate may use: wall-clock seconds, MiB of memory, MiB of any one file."""

    seconds: float = 3.0
    memory_mb: int = 1024
    file_mb: int = 16

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_mb", "file_mb"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(f"the limit {name} of code grading must be above 0, not {value!r}")


DEFAULT_LIMITS = Limits()


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of `k` draws from `samples` is correct: unbiased, equation 1.

    Raises:
        UserError: unless ``0 <= correct <= samples`` and ``1 <= k <= samples``.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise UserError(
            f"pass@{k} needs at least {k} samples and no more correct ones than samples, "
            f"not {correct} correct of {samples}"
        )
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def run_candidate(program: str, limits: Limits = DEFAULT_LIMITS) -> str:
    """Run a program that holds its own tests; "passed", "timed out" or "failed: <why>".

    Raises:
        UserError: on a system without process groups (Windows).
    """
    if os.name != "posix":
        raise UserError("generated code is graded on Linux and macOS only; run this task there")
    # Only a program that reaches its end makes the runner write this; leaving early does not.
    passed_line = f"passed {secrets.token_hex(16)}\n".encode()
    folder = Path(tempfile.mkdtemp(prefix="sa_patch_code_"))
    try:
        (folder / "work").mkdir()
        (folder / "program.py").write_text(program, encoding="utf-8", errors="surrogatepass")
        return _run(folder, passed_line, limits)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, passed_line: bytes, limits: Limits) -> str:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as reports, open(folder / "out", "wb+") as output:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(CANDIDATE_RUNNER), str(folder / "program.py")]
                + [str(value) for value in (writing, limits.memory_mb, limits.file_mb)],
                cwd=folder / "work",
                env=_environment(folder / "work"),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(passed_line)
            said, timed_out = _listen(reports.fileno(), limits.seconds)
        finally:
            # The group outlives its leader while any child of the candidate does.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        if passed_line in said:
            return "passed"
        if timed_out:
            return "timed out"
        return f"failed: {_last_line(output) or _exit_reason(status)}"


def _listen(reports: int, seconds: float) -> tuple[bytes, bool]:
    """What the runner reported until it left or its time was up, and whether time was up."""
    said = b""
    # Not select(): it fails on descriptors above 1,023, and a process with a model may hold many.
    ready = select.poll()
    ready.register(reports, select.POLLIN)
    deadline = time.monotonic() + START_SECONDS
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not ready.poll(remaining * 1000):
            return said, True
        chunk = os.read(reports, 4096)
        if not chunk:
            return said, False
        if STARTED not in said and STARTED in said + chunk:
            deadline = time.monotonic() + seconds
        said += chunk
        if said.count(b"\n") >= 2:
            return said, False


def _environment(home: Path) -> dict[str, str]:
    """A small environment: no tokens, no proxies, one thread per numeric library."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "HOME": str(home),
        "TMPDIR": str(home),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # numpy sets these two on import if they are missing, and a candidate cannot set any.
        "OPENBLAS_MAIN_FREE": "1",
        "GOTOBLAS_MAIN_FREE": "1",
    }


def _last_line(output: Any, most: int = 300) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - 4096))
    lines = output.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:most] if lines else ""


def _exit_reason(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"left with exit status {status} before its tests were done"


class CodeEval:
    """Stand-in for ``evaluate.load("code_eval")``, with the part of its interface that is used."""

    name = "code_eval"
    module_type = "metric"

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: int | Sequence[int] = (1, 10, 100),
        num_workers: int = 4,
        timeout: float = 3.0,
        memory_mb: int = 1024,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Grade candidates; ``references[i]`` is the test of each of ``predictions[i]``.

        Returns the mean pass@k over problems, for each k that every problem has samples for, and
        the single outcomes: problem -> list of (candidate number, outcome).

        Raises:
            UserError: if the two lists differ in length or a limit is not above 0.
        """
        if len(references) != len(predictions):
            raise UserError(
                f"code grading needs one test per problem, not {len(references)} tests for "
                f"{len(predictions)} problems"
            )
        limits = Limits(seconds=timeout, memory_mb=memory_mb)
        jobs = [
            (problem, number, f"{candidate}\n{test}")
            for problem, (test, candidates) in enumerate(zip(references, predictions, strict=True))
            for number, candidate in enumerate(candidates)
        ]
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
            graded = pool.map(lambda job: run_candidate(job[2], limits), jobs)
            for (problem, number, _), result in zip(jobs, graded, strict=True):
                outcome = {
                    "task_id": problem,
                    "passed": result == "passed",
                    "result": result,
                    "completion_id": number,
                }
                results.setdefault(problem, []).append((number, outcome))
        counts = [
            (len(outcomes), sum(outcome["passed"] for _, outcome in outcomes))
            for outcomes in results.values()
        ]
        scores = {
            f"pass@{draws}": sum(pass_at_k(n, c, draws) for n, c in counts) / len(counts)
            for draws in ([k] if isinstance(k, int) else k)
            if counts and all(n >= draws for n, _ in counts)
        }
        return scores, results


@contextmanager
def offline_code_eval() -> Iterator[None]:
    """While inside, ``evaluate.load("code_eval")`` gives `CodeEval`; other names load as always.

    lm-eval's own task files load the metric when the task is loaded and keep it, so it is enough
    to load tasks inside. The grader is ours with and without a network: a score must not depend on
    that. Whether generated code may run at all stays with lm-eval's ``confirm_run_unsafe_code``.
    """
    import evaluate

    original = evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        return CodeEval() if path == CodeEval.name else original(path, *args, **kwargs)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original
