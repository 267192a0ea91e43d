"""Cells as tasks of a Ray cluster: every worker holds one loaded model and computes cells of it.

The workers send results back and need share no folder with the sweep; where they do, they leave
there what full attention answered. A worker or a machine that dies costs the cell that it had a
further try, and nothing else.
"""

from __future__ import annotations

import platform
import time
from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.models.quiet_output import silenced
from sa_patch.sweep.cell_runner import Computed, check_model, failed_content
from sa_patch.sweep.config import ModelSpec, SweepConfig
from sa_patch.sweep.executor import Event, Finished, Message, Starts
from sa_patch.sweep.plan import Plan, PlannedCell
from sa_patch.sweep.ray.cluster import ClusterResources, check_reachable, cluster
from sa_patch.sweep.ray.worker import Job, SweepWorker, software

# Further tries of a cell, or of loading a model, whose worker died.
RETRIES = 2
# Seconds after which it is looked whether the cluster has grown or shrunk.
POLL_SECONDS = 2.0
# Seconds without a sign of life after which a user is told of it.
SILENCE_SECONDS = 60.0


class RayExecutor:
    """A Ray cluster.

    Args:
        address: of its head, "HOST:PORT"; "auto" for the one that runs on this machine; "" for
            that of RAY_ADDRESS, else one that is started here and ends with the sweep.
        modules: what workers import before they load a model.
        worker: the class that they are made of.

    Raises:
        UserError: if `ray` is not installed, or nothing listens at the address.
    """

    def __init__(
        self, address: str = "", modules: Sequence[str] = (), worker: type = SweepWorker
    ) -> None:
        check_reachable(address)
        self._address, self._modules, self._worker = address, tuple(modules), worker

    def run(
        self, config: SweepConfig, plan: Plan, cells: Sequence[PlannedCell], run_code: bool
    ) -> Generator[Event, None, None]:
        """See `sa_patch.sweep.executor.Executor`."""
        if not cells:
            return
        jobs: dict[ModelSpec, Job] = {}
        for model in dict.fromkeys(cell.model for cell in cells):
            own = tuple(cell for cell in cells if cell.model == model)
            check_model(model, own)
            jobs[model] = Job(
                config,
                _portable(model),
                own,
                plan.benchmarks,
                run_code,
                plan.answers,
                self._modules,
            )
        yield Starts("connecting to Ray")
        # Ray prints on its own account when a worker dies.
        with silenced(), cluster(self._address) as ray:
            pool = _WorkerPool(ray, jobs, self._worker)
            try:
                yield from pool.run()
            finally:
                pool.stop()


def _portable(model: ModelSpec) -> ModelSpec:
    """The model as a process in another folder finds it."""
    path = Path(model.pretrained).expanduser()
    return model.model_copy(update={"pretrained": str(path.absolute())}) if path.exists() else model


@dataclass(eq=False)
class _Worker:
    """An actor, and what it was last asked for ("describe", "prepare", "compute" or "idle")."""

    actor: Any
    model: ModelSpec
    gpus: float
    stage: str = "idle"
    cell: PlannedCell | None = None
    since: float = 0.0
    host: str = ""


class _WorkerPool:
    """The workers of one sweep, and the cells that wait for them."""

    def __init__(self, ray: Any, jobs: dict[ModelSpec, Job], worker: type) -> None:
        self._ray, self._jobs, self._software = ray, jobs, software()
        self._class = ray.remote(worker)
        self._queues = {model: deque(job.cells) for model, job in jobs.items()}
        self._workers: list[_Worker] = []
        self._calls: dict[Any, _Worker] = {}
        self._deaths_of_cells: Counter[str] = Counter()
        self._deaths_in_loading: Counter[ModelSpec] = Counter()
        self._error: UserError | None = None
        self._last_answer = time.monotonic()
        self._reported_waiting = False

    def run(self) -> Generator[Event, None, None]:
        """Compute all cells.

        Raises:
            UserError: once the cells that are being computed are done, if something is wrong that
                the user has to mend.
        """
        self._require_resources()
        while self._computing() or (not self._error and any(self._queues.values())):
            if not self._error:
                yield from self._start_workers()
                yield from self._assign()
            yield from self._report_waiting()
            if not self._calls:
                time.sleep(POLL_SECONDS)
                continue
            done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=POLL_SECONDS)
            for call in done:
                yield from self._receive(call)
        if self._error:
            raise self._error

    def stop(self) -> None:
        """End all workers, whatever they do."""
        for worker in self._workers[:]:
            self._stop_worker(worker)

    def _computing(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.cell is not None]

    def _require_resources(self) -> None:
        capacity = ClusterResources(self._ray)
        for model in self._jobs:
            if not capacity.max_workers(model.resources):
                raise UserError(
                    f"no machine of the Ray cluster has the {_resources_text(model, capacity)} "
                    f"that a worker of {model.pretrained} is to have (all machines together: "
                    f"{capacity.cpus:g} CPUs, {capacity.gpus:g} GPUs); change 'resources' in the "
                    "sweep file"
                )

    def _start_workers(self) -> Generator[Event, None, None]:
        """Start workers while resources are free, most for models with the most cells waiting."""
        for worker in self._workers[:]:
            # Nothing left for it, and its place may be wanted.
            if worker.stage == "idle" and not self._queues[worker.model] and self._all_waiting():
                self._stop_worker(worker)
        capacity = ClusterResources(self._ray)
        while True:
            wanting = [model for model in self._queues if self._wants_worker(model, capacity)]
            if not wanting:
                return
            model = max(wanting, key=lambda one: len(self._queues[one]) / (1 + self._count(one)))
            gpus = capacity.gpus_per_worker(model.resources)
            # Ray would otherwise start the actor or its calls again, and nobody would count.
            options = {"max_restarts": 0, "max_task_retries": 0}
            actor = self._class.options(
                num_cpus=model.resources.cpus, num_gpus=gpus, **options
            ).remote(gpus)
            worker = _Worker(actor, model, gpus)
            self._workers.append(worker)
            self._call(worker, "describe")
            yield Starts(f"loading {model.pretrained}", len(self._computing()))

    def _all_waiting(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def _count(self, model: ModelSpec) -> int:
        return sum(worker.model == model for worker in self._workers)

    def _wants_worker(self, model: ModelSpec, capacity: ClusterResources) -> bool:
        own = [worker for worker in self._workers if worker.model == model]
        free = sum(worker.cell is None for worker in own)
        cpus = capacity.cpus - sum(worker.model.resources.cpus for worker in self._workers)
        gpus = capacity.gpus - sum(worker.gpus for worker in self._workers)
        needs = model.resources
        return (
            len(self._queues[model]) > free
            and len(own) < capacity.max_workers(needs)
            and cpus >= needs.cpus
            and gpus >= capacity.gpus_per_worker(needs)
        )

    def _assign(self) -> Generator[Event, None, None]:
        for worker in self._workers:
            if worker.stage == "idle" and self._queues[worker.model]:
                worker.cell = self._queues[worker.model].popleft()
                self._call(worker, "compute", worker.cell)
                yield Starts(worker.cell.label, len(self._computing()))

    def _call(self, worker: _Worker, method: str, *arguments: Any) -> None:
        worker.stage, worker.since = method, time.monotonic()
        self._calls[getattr(worker.actor, method).remote(*arguments)] = worker

    def _receive(self, call: Any) -> Generator[Event, None, None]:
        """Take a worker's answer, or its death."""
        worker = self._calls.pop(call)
        if worker not in self._workers:
            return
        self._last_answer, self._reported_waiting = time.monotonic(), False
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayTaskError:
            # A mistake in our own code, as it would be in this process.
            raise
        except self._ray.exceptions.RayError as error:
            self._stop_worker(worker)
            yield from self._handle_death(worker, error)
            return
        stage, worker.stage = worker.stage, "idle"
        if stage == "describe":
            worker.host, found = answer
            if different := _differences(self._software, found):
                self._reject(worker, f"it has {different}; install the same on every machine")
            else:
                self._call(worker, "prepare", self._jobs[worker.model])
        elif stage == "prepare":
            self._deaths_in_loading[worker.model] = 0
            if answer is not None:
                self._reject(worker, answer)
        else:
            cell, worker.cell = worker.cell, None
            assert cell is not None
            yield Finished(cell, answer)

    def _reject(self, worker: _Worker, sentence: str) -> None:
        elsewhere = worker.host and worker.host != platform.node()
        where = f"on {worker.host}: " if elsewhere else ""
        self._error = self._error or UserError(f"{where}{sentence}")
        self._stop_worker(worker)

    def _handle_death(self, worker: _Worker, error: Exception) -> Generator[Event, None, None]:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if worker.cell is None:
            self._deaths_in_loading[worker.model] += 1
            if self._deaths_in_loading[worker.model] > RETRIES:
                last = " ".join(str(error).split())[-300:]
                self._error = self._error or UserError(
                    f"{RETRIES + 1} workers died one after another before they had loaded "
                    f"{worker.model.pretrained}, the last one with {reason} … {last}"
                )
            else:
                yield Message(f"a worker died before it had loaded its model ({reason})")
            return
        cell = worker.cell
        self._deaths_of_cells[cell.id] += 1
        if self._deaths_of_cells[cell.id] <= RETRIES:
            self._queues[worker.model].appendleft(cell)
            yield Message(f"{cell.label}: its worker died and it is tried again ({reason})")
            return
        content = failed_content(
            cell, f"WorkerDied: {RETRIES + 1} workers died while they computed it; {reason}"
        )
        content["seconds"] = round(time.monotonic() - worker.since, 3)
        yield Finished(cell, Computed(content, str(error)))

    def _stop_worker(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.actor)

    def _report_waiting(self) -> Generator[Event, None, None]:
        """Say once that nothing can be done for the time being."""
        waiting = not any(worker.host for worker in self._workers)
        silent = time.monotonic() - self._last_answer > SILENCE_SECONDS
        if waiting and silent and not self._reported_waiting:
            self._reported_waiting = True
            yield Message("waiting for the Ray cluster: it has no free resources for a worker yet")


def _resources_text(model: ModelSpec, capacity: ClusterResources) -> str:
    gpus = capacity.gpus_per_worker(model.resources)
    return f"{model.resources.cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _differences(ours: dict[str, str | None], theirs: dict[str, str | None]) -> str:
    """``torch 2.11 and not 2.13``, for everything that is not the same."""
    return ", ".join(
        f"{name} {theirs.get(name)} and not {version}"
        for name, version in ours.items()
        if theirs.get(name) != version
    )
