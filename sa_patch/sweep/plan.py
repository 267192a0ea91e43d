"""From a sweep's configuration to its list of cells, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.evaluation.tasks.benchmarks import Benchmarks
from sa_patch.evaluation.tasks.catalogue import Catalogue, TaskInfo
from sa_patch.evaluation.tasks.names import recorded_name
from sa_patch.evaluation.tasks.ruler import DEFAULT_LENGTH, check_length
from sa_patch.files.settings import as_tuple
from sa_patch.models.embedded import resolve_model
from sa_patch.patching import Schedule
from sa_patch.patterns import Pattern, seed_of
from sa_patch.sweep.cells import PROMPT_SETTINGS, cell_id, pattern_fields
from sa_patch.sweep.config import ModelSpec, SweepConfig, TaskSettings, TaskSpec
from sa_patch.sweep.grid import MethodSpec

LENGTHS = "max_seq_lengths"


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
    def task_at_length(self) -> str:
        """The task's name, with the length where there are several; such cells cost about alike."""
        return f"{self.info.name} {self.info.length}" if self.info.length else self.info.name

    @property
    def label(self) -> str:
        layers = f"  layers {self.layers}" if str(self.layers) else ""
        return f"{self.task_at_length}  {self.pattern}{layers}"


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
        UserError: if a model or task is unknown, a local data set or what a task's documents are
            made from is missing, or a task runs generated code and `run_code` is not given.
    """
    local = None if benchmarks is None else Benchmarks(benchmarks)
    catalogue = Catalogue([task.task for task in config.tasks])
    tasks = [
        (one, catalogue.info(member, _length(one.metadata)))
        for task in config.tasks
        for one in _each_length(task, catalogue.is_ruler(task.task))
        for member in catalogue.members(task.task, apart=LENGTHS in one.metadata)
    ]
    unsafe = [info.name for _, info in tasks if info.runs_code]
    if unsafe and not run_code:
        raise UserError(
            f"{', '.join(unsafe)} runs code that the model writes on this machine; add "
            "--confirm-run-unsafe-code if you accept that, or leave the task out"
        )
    for info in dict.fromkeys(info for _, info in tasks):
        catalogue.check_inputs(info, None if local is None else local.folder)
    methods = sorted(config.methods, key=_early)
    cells: dict[str, PlannedCell] = {}
    for model in config.models:
        identity = resolve_model(model.pretrained, model.gguf_file, model.revision).identity
        for task, info in tasks:
            shared = _shared_fields(config, model, identity, task, info)
            shared["data"] = None if local is None else local.digest(info.name, info.datasets)
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


def _each_length(task: TaskSpec, ruler: bool) -> list[TaskSpec]:
    """The task once for each length that its metadata names, so that lengths are cells."""
    default = [DEFAULT_LENGTH] if ruler else None
    lengths = task.metadata.get(LENGTHS, default)
    if lengths is None:
        return [task]
    lengths = as_tuple(lengths)
    if not lengths:
        raise UserError(f"task {task.task!r}: {LENGTHS} lists nothing; give [4096], for example")
    for length in lengths:
        if ruler:
            check_length(length)
        elif isinstance(length, (list, dict)):
            raise UserError(f"task {task.task!r}: {LENGTHS} are numbers or texts, got {length!r}")
    return [
        task.model_copy(update={"metadata": {**task.metadata, LENGTHS: [length]}})
        for length in dict.fromkeys(lengths)
    ]


def _length(metadata: Mapping[str, Any]) -> Any:
    found = metadata.get(LENGTHS)
    return found[0] if found else None


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
        "task": recorded_name(info.name),
        "task_version": info.version,
        "limit": task.limit,
        "num_fewshot": info.num_fewshot(task.num_fewshot),
        "gen_kwargs": dict(task.gen_kwargs) if info.generates else {},
        **_given(task),
    }


def _given(task: TaskSpec) -> dict[str, Any]:
    """The later settings where they are used: cells from before them keep their names."""
    unused = TaskSettings()
    found = {key: getattr(task, key) for key in PROMPT_SETTINGS}
    return {key: value for key, value in found.items() if value != getattr(unused, key)}
