"""Tasks by name: lm-eval's and our own, checked and described before any model is loaded."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from sa_patch.errors import UserError
from sa_patch.evaluation.code_grading import offline_code_eval
from sa_patch.evaluation.tasks import ruler
from sa_patch.evaluation.tasks.benchmarks import reading_copies
from sa_patch.evaluation.tasks.infinitebench import data_settings, is_infinitebench
from sa_patch.evaluation.tasks.names import current_name
from sa_patch.evaluation.tasks.packages import require_packages
from sa_patch.evaluation.tasks.task_index import every_task
from sa_patch.files.packaged import tasks_dir

# The metric that stands for a task, and what guessing scores. Tasks of ours say so themselves, in
# their YAML's metadata.
PRIMARY: dict[str, tuple[str, float | None]] = {
    "hellaswag": ("acc_norm", 0.25),
    "arc_challenge": ("acc_norm", 0.25),
    "arc_easy": ("acc_norm", 0.25),
    "mmlu": ("acc", 0.25),
    "boolq": ("acc", 0.5),
    "lambada_openai": ("acc", 0.0),
    "humaneval": ("pass@1", 0.0),
    "humaneval_instruct": ("pass@1", 0.0),
}


@dataclass(frozen=True)
class TaskInfo:
    """What a task's YAML says that matters to a sweep.

    Args:
        needs_tokenizer: a function makes its documents, and may ask for the model's tokenizer.
        length: tokens of RULER's documents; None for other tasks.
    """

    name: str
    version: str | float | None
    primary_metric: str | None
    chance: float | None
    generates: bool
    runs_code: bool
    fixed_fewshot: int | None
    datasets: tuple[str, ...]
    needs_tokenizer: bool = False
    length: int | None = None

    def num_fewshot(self, asked: int | None) -> int:
        """How many examples a prompt gets: a task that fixes 0 keeps 0, as in lm-eval."""
        if self.fixed_fewshot == 0 or asked is None:
            return self.fixed_fewshot or 0
        return asked


@lru_cache(maxsize=1)
def _every_task(folder: Path) -> TaskManager:
    """lm-eval's tasks and those in `folder`."""
    return every_task(folder)


class Catalogue:
    """The tasks that a sweep can name.

    lm-eval indexes 14,000 files, so its own tasks are only asked for when one of `names` is not
    ours, and once in a process.

    Raises:
        UserError: if a name is unknown, with the nearest known ones.
    """

    def __init__(self, names: list[str]) -> None:
        names = [current_name(name) for name in names]
        self._manager = TaskManager(include_path=tasks_dir(), include_defaults=False)
        if any(name not in self._manager.task_index for name in names):
            self._manager = _every_task(tasks_dir())
        for name in names:
            self.require(name)

    def require(self, name: str) -> None:
        """Raise a UserError with the nearest names unless `name` is a known task."""
        known = self._manager.all_tasks
        if name in known:
            return
        closest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        meant = f"did you mean {', '.join(repr(word) for word in closest)}?" if closest else ""
        raise UserError(
            f"unknown task {name!r}; {meant or 'no known task has a similar name;'} "
            "`sa-patch lm-eval ls tasks` lists all of them"
        )

    def members(self, name: str, apart: bool = False) -> list[str]:
        """The tasks that a name stands for: itself, or every task of an lm-eval tag.

        Args:
            apart: give the tasks of any group one by one, as those of RULER and InfiniteBench are.
        """
        name = current_name(name)
        entry = self._manager.task_index[name]
        if entry.kind.name == "TAG":
            return sorted(entry.tags)
        if entry.kind.name == "GROUP":
            tasks = list(self._single_tasks(name))
            if apart or any(ruler.is_ruler(task) or is_infinitebench(task) for task in tasks):
                return [str(task["task"]) for task in tasks]
        return [name]

    def is_ruler(self, name: str) -> bool:
        """Whether a task, or every task of a group, is one of RULER's."""
        tasks = list(self._single_tasks(current_name(name)))
        return bool(tasks) and all(ruler.is_ruler(task) for task in tasks)

    def info(self, name: str, length: int | None = None) -> TaskInfo:
        """Describe a task or group from its YAML alone, loading no data.

        Args:
            length: of RULER's documents.
        """
        own = self._config(name)
        tasks = list(self._single_tasks(name))
        metric, chance = self._primary(name, own, tasks)
        fewshot = {task.get("num_fewshot") for task in tasks}
        info = TaskInfo(
            name=name,
            version=_metadata(own).get("version"),
            primary_metric=metric,
            chance=chance,
            generates=any(task.get("output_type") == "generate_until" for task in tasks),
            runs_code=any(task.get("unsafe_code") for task in tasks),
            fixed_fewshot=fewshot.pop() if len(fewshot) == 1 else None,
            datasets=tuple(
                sorted({task["dataset_path"] for task in tasks if task.get("dataset_path")})
            ),
            needs_tokenizer=any(map(ruler.makes_documents, tasks)),
        )
        if not ruler.is_ruler(own):
            return info
        return replace(
            info,
            primary_metric=ruler.METRIC,
            chance=0.0,
            datasets=ruler.datasets(name),
            length=length or ruler.DEFAULT_LENGTH,
        )

    def check_inputs(self, info: TaskInfo, benchmarks: Path | None) -> None:
        """Raise a UserError if a task's packages are missing, or what its documents are made of."""
        for task in self._single_tasks(info.name):
            require_packages(str(task["task"]), task)
        if info.length is not None:
            ruler.check_inputs(info.name, benchmarks)

    def load(
        self, info: TaskInfo, benchmarks: Path | None, metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Load a task's data; the value of `lm_eval.tasks.TaskManager.load`.

        With `benchmarks`, lm-eval's unmodified files read their data below that folder. `metadata`
        is what a task's own functions are told, a `tokenizer` among it.
        """
        # The index is shared.
        manager = copy.copy(self._manager)
        manager._factory = TaskFactory(meta=dict(metadata or {}))
        with offline_code_eval(), reading_copies(benchmarks, info.datasets):
            if info.length is not None:
                with ruler.making_documents(benchmarks):
                    own = self._resolved(info.name)
                    scores = ruler.scores(info.name, info.length, own["process_results"])
                    return dict(manager.load([{**own, **scores}]))
            if is_infinitebench(self._config(info.name)):
                own = self._resolved(info.name)
                return dict(manager.load([{**own, **data_settings(own)}]))
            return dict(manager.load([info.name]))

    def _resolved(self, name: str) -> dict[str, Any]:
        """A task's configuration, its functions loaded."""
        return dict(load_yaml(self._manager.task_index[name].yaml_path, resolve_func=True))

    def _config(self, name: str) -> Mapping[str, Any]:
        entry = self._manager.task_index[name]
        config: Mapping[str, Any] = entry.cfg or {}
        version = _metadata(config).get("version")
        # The index leaves "!function module.NAME" as a path; only then is the file's code read.
        if entry.yaml_path and isinstance(version, str) and os.sep in version:
            config = load_yaml(entry.yaml_path, resolve_func=True)
        return config

    def _single_tasks(self, name: str) -> Iterator[Mapping[str, Any]]:
        entry = self._manager.task_index.get(name)
        if entry is None:
            return
        if entry.kind.name == "TAG":
            for member in sorted(entry.tags):
                yield from self._single_tasks(member)
        elif entry.kind.name == "GROUP":
            for child in self._config(name).get("task") or []:
                if isinstance(child, Mapping):
                    child_name = child.get("task") or child.get("group") or ""
                    for task in self._single_tasks(str(child_name)):
                        yield {**task, **child}
                else:
                    yield from self._single_tasks(child)
        else:
            yield self._config(name)

    def _primary(
        self, name: str, own: Mapping[str, Any], tasks: list[Mapping[str, Any]]
    ) -> tuple[str | None, float | None]:
        if name in PRIMARY:
            return PRIMARY[name]
        for said in map(_metadata, [own, *tasks[:1]]):
            if "primary_metric" in said:
                return said["primary_metric"], said.get("chance")
        listed = own.get("aggregate_metric_list") or own.get("metric_list") or []
        named = [metric for entry in listed if (metric := _metric_name(entry))]
        return ("acc_norm" if "acc_norm" in named else named[0] if named else None), None


def _metric_name(entry: Any) -> str | None:
    """The name of a listed metric's scores; None where it has none."""
    metric = entry.get("metric") if isinstance(entry, Mapping) else None
    if not isinstance(metric, str):
        return None
    # The index leaves "!function utils.NAME" as a path; code tasks name their scores by k.
    if os.sep in metric and entry.get("k"):
        return f"pass@{entry['k'][0]}"
    return metric.rsplit(".", 1)[-1] if os.sep in metric else metric


def _metadata(config: Mapping[str, Any]) -> Mapping[str, Any]:
    said = config.get("metadata")
    return said if isinstance(said, Mapping) else {}
