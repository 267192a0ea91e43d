"""What a sweep over whole data sets would take, from a small run of it on the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sa_patch.errors import UserError
from sa_patch.harness.results import Cell

# Items of the splits that lm-eval scores, from the data sets' cards.
WHOLE_ITEMS = {
    "hellaswag": 10_042,
    "mmlu": 14_042,
    "arc_easy": 2_376,
    "arc_challenge": 1_172,
    "boolq": 3_270,
    "lambada_openai": 5_153,
    "humaneval": 164,
}


@dataclass(frozen=True)
class TaskCost:
    """Of all cells of one model on one task.

    ``sampled`` and ``items`` are items of the small run and of the whole data; ``tokens`` those of
    all prompts of one cell on the whole data, None if they were not counted; ``hours`` of all cells
    one after the other.
    """

    model: str
    task: str
    cells: int
    sampled: int
    items: int
    tokens: float | None
    hours: float


def extrapolate(cells: Sequence[Cell], items: Mapping[str, int]) -> list[TaskCost]:
    """Costs by model and task, every cell's time taken as proportional to its items.

    What a cell takes whatever its size is multiplied too, so that the figure is rather too high,
    the more so the smaller the run was.

    Args:
        items: of the whole data, by task; `WHOLE_ITEMS` holds the rest.

    Raises:
        UserError: if the size of a task's data is not known, or a cell has no time or item count.
    """
    known = WHOLE_ITEMS | dict(items)
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((str(cell.setting["model_name"]), cell.task), []).append(cell)
    return [_cost(model, task, group, known) for (model, task), group in groups.items()]


def _cost(model: str, task: str, cells: Sequence[Cell], known: Mapping[str, int]) -> TaskCost:
    if task not in known:
        raise UserError(f"how many items has {task}? say so with --items {task}=NUMBER")
    if any(not cell.samples or cell.seconds is None for cell in cells):
        raise UserError(f"a cell of {task} has no time or no number of items; sweep it again")
    whole = known[task]
    seconds = sum((cell.seconds or 0.0) / (cell.samples or 1) * whole for cell in cells)
    each = [cell.tokens_per_item for cell in cells]
    tokens = None if None in each else whole * statistics.fmean(one or 0.0 for one in each)
    sampled = min(cell.samples or 0 for cell in cells)
    return TaskCost(model, task, len(cells), sampled, whole, tokens, seconds / 3600)


def read_items(texts: Sequence[str]) -> dict[str, int]:
    """``["needle_256=20"]`` as a mapping.

    Raises:
        UserError: for a text of another form.
    """
    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name or not number.isdigit() or int(number) < 1:
            raise UserError(f"--items takes TASK=NUMBER, such as needle_256=20, got {text!r}")
        found[name] = int(number)
    return found
