"""What runs in a worker process of a Ray cluster: one loaded model, and cells of it on demand.

Knows nothing of Ray. What a user has to mend comes back as a sentence and not as an exception,
which Ray would wrap in its own traceback.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_patch.errors import UserError
from sa_patch.files.provenance import code_digest, versions

# Elsewhere imported late: a machine with other versions is refused before torch is imported there.
if TYPE_CHECKING:
    from sa_patch.sweep.cell_runner import Computed
    from sa_patch.sweep.config import ModelSpec, SweepConfig
    from sa_patch.sweep.plan import PlannedCell


@dataclass(frozen=True)
class Job:
    """All that a worker needs for one model's cells.

    Args:
        modules: what to import first, for example to make kinds of models known.
    """

    config: SweepConfig
    model: ModelSpec
    cells: tuple[PlannedCell, ...]
    benchmarks: Path | None
    run_code: bool
    answers: Path | None
    modules: tuple[str, ...] = ()


def software() -> dict[str, str | None]:
    """What must be the same in all processes of one sweep."""
    return {**versions(), "sa_patch's code": code_digest()}


class SweepWorker:
    """One process that computes cells of one model."""

    def __init__(self, gpus: float) -> None:
        if not gpus:
            # Whoever was given none must not sit on the first one, which is somebody else's.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def describe(self) -> tuple[str, dict[str, str | None]]:
        """The machine's name, and its `software`."""
        return platform.node(), software()

    def prepare(self, job: Job) -> str | None:
        """Load the model, if it and the data are those that the sweep was planned with.

        Returns:
            None, or why cells cannot be computed here.
        """
        from sa_patch.evaluation.tasks.catalogue import Catalogue
        from sa_patch.sweep.cell_runner import CellRunner

        for name in job.modules:
            importlib.import_module(name)
        try:
            self._check_inputs(job)
            catalogue = Catalogue([task.task for task in job.config.tasks])
            self._runner = CellRunner(
                job.config, job.model, catalogue, job.benchmarks, job.run_code, job.answers
            )
            self._runner.try_patterns(job.cells)
        except UserError as error:
            return str(error)
        return None

    def compute(self, cell: PlannedCell) -> Computed:
        return self._runner.compute(cell)

    def _check_inputs(self, job: Job) -> None:
        from sa_patch.evaluation.tasks.benchmarks import Benchmarks
        from sa_patch.models.embedded import resolve_model
        from sa_patch.sweep.cell_runner import check_model

        check_model(job.model, job.cells)
        model = job.model
        found: Any = resolve_model(model.pretrained, model.gguf_file, model.revision).identity
        _require_same(f"the model {model.pretrained!r}", found, job.cells[0].cell["model"])
        if job.benchmarks is None:
            return
        local = Benchmarks(job.benchmarks)
        for cell in _one_of_each_task(job.cells):
            what = f"the data of {cell.info.name} in {job.benchmarks}"
            _require_same(what, local.digest(cell.info.name, cell.info.datasets), cell.cell["data"])


def _one_of_each_task(cells: Sequence[PlannedCell]) -> list[PlannedCell]:
    return list({cell.info.name: cell for cell in cells}.values())


def _require_same(what: str, here: Any, planned: Any) -> None:
    if here != planned:
        raise UserError(
            f"{what} is not the one that the sweep was started with ({here}, not {planned}); "
            "every machine of the cluster needs the same files at the same place"
        )
