"""Where the cells of a sweep are computed: what every such place tells the sweep, and this process.

An executor computes and reports; the run folder, the counting and the screen are the sweep's.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from sa_patch.sweep.cell_runner import CellRunner, Computed, check_model
from sa_patch.sweep.config import SweepConfig
from sa_patch.sweep.plan import Plan, PlannedCell


@dataclass(frozen=True)
class Starts:
    """Something begins, the load of a model or a cell; `at_once` cells are computed at a time."""

    label: str
    at_once: int = 1


@dataclass(frozen=True)
class Message:
    """Something that a user should know of, and that ends nothing."""

    sentence: str


@dataclass(frozen=True)
class Finished:
    """A cell has its result, or has failed."""

    cell: PlannedCell
    computed: Computed


Event = Starts | Message | Finished


class Executor(Protocol):
    """A place where cells are computed."""

    def run(
        self, config: SweepConfig, plan: Plan, cells: Sequence[PlannedCell], run_code: bool
    ) -> Generator[Event, None, None]:
        """Compute `cells`, each of which comes back as one `Finished`.

        Closing the generator early must leave nothing running.

        Raises:
            UserError: if a model cannot be loaded or patched as asked, or the place itself cannot
                be reached.
        """
        ...


class LocalExecutor:
    """This process: one model after another, its cells in the order of the plan."""

    def run(
        self, config: SweepConfig, plan: Plan, cells: Sequence[PlannedCell], run_code: bool
    ) -> Generator[Event, None, None]:
        for model, group in itertools.groupby(cells, key=lambda cell: cell.model):
            own = list(group)
            check_model(model, own)
            yield Starts(f"loading {model.pretrained}")
            runner = CellRunner(
                config, model, plan.catalogue, plan.benchmarks, run_code, plan.answers
            )
            # What the model cannot take at all is the user's to mend: no cell runs.
            runner.try_patterns(own)
            for cell in own:
                yield Starts(cell.label)
                yield Finished(cell, runner.compute(cell))
            # Two models need not fit into memory together.
            del runner
