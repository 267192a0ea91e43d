"""Cells in several processes of this machine, each with a model of its own, until time is up.

A small model leaves a GPU idle while Python prepares its next batch; several processes that share
the GPU fill the gaps.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from sa_patch.errors import UserError, one_line
from sa_patch.models.quiet_output import silenced
from sa_patch.sweep.cell_runner import CellRunner, Computed, check_model, failed_content
from sa_patch.sweep.config import SweepConfig
from sa_patch.sweep.executor import Event, Finished, Message, Starts
from sa_patch.sweep.plan import Plan, PlannedCell

# Seconds that a process is given to end.
EXIT_SECONDS = 5.0


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    tasks: set[str]
    cell: PlannedCell | None = None


class ProcessExecutor:
    """Processes of this machine that share its CPUs and its GPU; they start at once, and wait.

    Args:
        jobs: how many, at least 1.
        seconds: after which no result is waited for any more; what is being computed then is lost.
            None for no end.
    """

    def __init__(self, jobs: int, seconds: float | None = None) -> None:
        self._jobs = jobs
        self._workers = [_start() for _ in range(jobs)]
        self._end = None if seconds is None else time.monotonic() + seconds

    def run(
        self, config: SweepConfig, plan: Plan, cells: Sequence[PlannedCell], run_code: bool
    ) -> Generator[Event, None, None]:
        """See `sa_patch.sweep.executor.Executor`; `cells` are begun in the order given, roughly."""
        models = dict.fromkeys(cell.model for cell in cells)
        if len(models) > 1:
            raise UserError("processes that share a machine take one model at a time")
        if not cells:
            return
        (model,) = models
        check_model(model, cells)
        waiting, workers = deque(cells), self._workers
        # Indexing lm-eval's tasks takes longer than handing the index on.
        shared = (config, model, plan.catalogue, plan.benchmarks, run_code, plan.answers)
        payload = pickle.dumps((shared, list(cells)))
        yield Starts(f"loading {model.pretrained}", self._jobs)
        try:
            for worker in workers:
                worker.connection.send_bytes(payload)
            while workers:
                ready = wait([worker.connection for worker in workers], self._left())
                if not ready:
                    yield Message(f"time is up; {_count(waiting, workers)} cells are left")
                    return
                for worker in [each for each in workers if each.connection in ready]:
                    yield from self._receive(worker, waiting)
                    if worker.cell is None:
                        workers.remove(worker)
                        _stop([worker])
            if waiting:
                raise UserError("all processes have ended before the cells were done")
        finally:
            _stop(workers)

    def _left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def _receive(
        self, worker: _Worker, waiting: deque[PlannedCell]
    ) -> Generator[Event, None, None]:
        """Take a worker's answer and give it a cell; it has none afterwards if it is to end."""
        done, worker.cell = worker.cell, None
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(EXIT_SECONDS)
            reason = f"its process died (exit status {worker.process.exitcode})"
            if done is None:
                yield Message(f"a process has none of the cells: {reason}")
            else:
                yield Finished(done, Computed(failed_content(done, reason), ""))
            return
        if isinstance(answer, Computed) and done is not None:
            yield Finished(done, answer)
        elif answer is not None:
            raise UserError(str(answer))
        if not waiting:
            return
        # A task that it has loaded, if one is near, so that not every process loads all of them.
        near = list(waiting)[: self._jobs]
        cell = next((each for each in near if each.info.name in worker.tasks), near[0])
        waiting.remove(cell)
        worker.cell = cell
        worker.tasks.add(cell.info.name)
        worker.connection.send(cell)
        yield Starts(cell.label, self._jobs)


def _count(waiting: Sequence[PlannedCell] | deque[PlannedCell], workers: list[_Worker]) -> int:
    return len(waiting) + sum(worker.cell is not None for worker in workers)


def _start() -> _Worker:
    # A forked process could not use a GPU that this one has touched.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, set())


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(EXIT_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()


def _work(connection: Connection) -> None:
    """What runs in a process: load the model, then cells until the other end is closed."""
    # Imported while the sweep is planned.
    import sa_patch.evaluation.lm_eval_model  # noqa: F401

    try:
        shared, cells = pickle.loads(connection.recv_bytes())
        try:
            with silenced():
                runner = CellRunner(*shared)
                runner.try_patterns(cells)
        except Exception as error:
            connection.send(f"a process could not begin: {one_line(error)}")
            return
        connection.send(None)
        while True:
            connection.send(runner.compute(connection.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        return
