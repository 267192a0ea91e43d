"""From a sweep's configuration to its list of cells, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.evaluation.tasks import Benchmarks, Catalogue, TaskInfo
from sa_patch.models.embedded import resolve_model
from sa_patch.patching import Schedule
from sa_patch.patterns import Pattern, seed_of
from sa_patch.sweep.cells import cell_id, pattern_fields
from sa_patch.sweep.config import ModelSpec, SweepConfig, TaskSpec
from sa_patch.sweep.grid import MethodSpec


@dataclass(frozen=True)
class PlannedCell:
    """One cell to be: its identity, and the objects to compute it with."""

    id: str
    cell: Mapping[str, Any]
    model: ModelSpec
    pattern: Pattern
    layers: Schedule
    task: TaskSpec
    info: TaskInfo

    @property
    def label(self) -> str:
        layers = f"  layers {self.layers}" if str(self.layers) else ""
        return f"{self.info.name}  {self.pattern}{layers}"


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep: by model, then task by task, full attention and first seeds first.

    `answers` is the folder of what full attention answered, which cells reuse; None if not.
    """

    cells: tuple[PlannedCell, ...]
    catalogue: Catalogue
    benchmarks: Path | None
    answers: Path | None = None


def make_plan(
    config: SweepConfig, *, benchmarks: Path | str | None = None, run_code: bool = False
) -> Plan:
    """Lay out the grid; loads no model and no data.

    Raises:
        UserError: if a model or task is unknown, a local data set is missing, or a task runs
            generated code and `run_code` is not given.
    """
    local = None if benchmarks is None else Benchmarks(benchmarks)
    catalogue = Catalogue([task.task for task in config.tasks])
    tasks = [
        (task, catalogue.info(member))
        for task in config.tasks
        for member in catalogue.members(task.task)
    ]
    unsafe = [info.name for _, info in tasks if info.runs_code]
    if unsafe and not run_code:
        raise UserError(
            f"{', '.join(unsafe)} runs code that the model writes on this machine; add "
            "--confirm-run-unsafe-code if you accept that, or leave the task out"
        )
    methods = sorted(config.methods, key=_early)
    cells: dict[str, PlannedCell] = {}
    for model in config.models:
        identity = resolve_model(model.pretrained, model.gguf_file, model.revision).identity
        for task, info in tasks:
            shared = _shared_fields(config, model, identity, task, info)
            shared["data"] = None if local is None else local.digest(info)
            for method in methods:
                layers = config.layers_of(method)
                cell = {
                    **shared,
                    **pattern_fields(method.pattern),
                    "layers": layers.to_plain(),
                }
                identifier = cell_id(cell)
                planned = PlannedCell(identifier, cell, model, method.pattern, layers, task, info)
                cells.setdefault(identifier, planned)
    return Plan(tuple(cells.values()), catalogue, None if local is None else local.folder)


def _early(method: MethodSpec) -> tuple[bool, int]:
    return method.pattern.name != "full", seed_of(method.pattern) or 0


def _shared_fields(
    config: SweepConfig, model: ModelSpec, identity: str, task: TaskSpec, info: TaskInfo
) -> dict[str, Any]:
    return {
        "model": identity,
        "model_name": model.pretrained,
        "decode": config.decode,
        "backend": config.backend,
        "dtype": model.dtype,
        "task": info.name,
        "task_version": info.version,
        "limit": task.limit,
        "num_fewshot": info.num_fewshot(task.num_fewshot),
        "gen_kwargs": dict(task.gen_kwargs) if info.generates else {},
    }
