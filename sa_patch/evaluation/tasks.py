"""Tasks by name: lm-eval's and our own, checked and described before any model is loaded."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from sa_patch.errors import UserError
from sa_patch.evaluation.code_grading import offline_code_eval
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
}


@dataclass(frozen=True)
class TaskInfo:
    """What a task's YAML says that matters to a sweep."""

    name: str
    version: str | float | None
    primary_metric: str | None
    chance: float | None
    generates: bool
    runs_code: bool
    fixed_fewshot: int | None
    datasets: tuple[str, ...]

    def num_fewshot(self, asked: int | None) -> int:
        """How many examples a prompt gets: a task that fixes 0 keeps 0, as in lm-eval."""
        if self.fixed_fewshot == 0 or asked is None:
            return self.fixed_fewshot or 0
        return asked


@lru_cache(maxsize=1)
def _every_task(folder: Path) -> TaskManager:
    """lm-eval's tasks and those in `folder`."""
    return TaskManager(include_path=folder)


class Catalogue:
    """The tasks that a sweep can name.

    lm-eval indexes 14,000 files, which takes seconds, so its own tasks are only indexed when one
    of `names` is not ours, and once in a process.

    Raises:
        UserError: if a name is unknown, with the nearest known ones.
    """

    def __init__(self, names: list[str]) -> None:
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

    def members(self, name: str) -> list[str]:
        """The tasks that a name stands for: itself, or every task of an lm-eval tag."""
        entry = self._manager.task_index[name]
        return sorted(entry.tags) if entry.kind.name == "TAG" else [name]

    def info(self, name: str) -> TaskInfo:
        """Describe a task or group from its YAML alone, loading no data."""
        own = self._config(name)
        tasks = list(self._single_tasks(name))
        metric, chance = self._primary(name, own, tasks)
        fewshot = {task.get("num_fewshot") for task in tasks}
        return TaskInfo(
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
        )

    def load(self, name: str, benchmarks: Path | None) -> dict[str, Any]:
        """Load a task's data; the value of `lm_eval.tasks.TaskManager.load`.

        With `benchmarks`, lm-eval's unmodified files read their data below that folder.
        """
        with offline_code_eval(), working_directory(benchmarks):
            return dict(self._manager.load([name]))

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
        names = [entry.get("metric") for entry in listed if isinstance(entry, Mapping)]
        named = [metric for metric in names if isinstance(metric, str)]
        return ("acc_norm" if "acc_norm" in named else named[0] if named else None), None


def _metadata(config: Mapping[str, Any]) -> Mapping[str, Any]:
    said = config.get("metadata")
    return said if isinstance(said, Mapping) else {}


@contextlib.contextmanager
def working_directory(folder: Path | None) -> Iterator[None]:
    """Be in `folder` for a while; None stays where we are."""
    if folder is None:
        yield
        return
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Benchmarks:
    """A folder of local data sets laid out like their hub repositories (``Rowan/hellaswag``).

    Raises:
        UserError: if it is no folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise UserError(
                f"no benchmarks folder at {folder}; give a folder that holds data sets laid out "
                "like their hub repositories, for example Rowan/hellaswag"
            )
        self._digests: dict[str, str] = {}

    def digest(self, info: TaskInfo) -> str | None:
        """A hash of the data that a task reads from here; None if it brings its own.

        Raises:
            UserError: if a data set of the task is missing.
        """
        needed = [name for name in info.datasets if "/" in name]
        for name in needed:
            if name not in self._digests:
                self._digests[name] = self._hash(name, info.name)
        joined = ",".join(f"{name}={self._digests[name]}" for name in needed)
        return hashlib.sha256(joined.encode()).hexdigest()[:16] if needed else None

    def _hash(self, name: str, task: str) -> str:
        root = self.folder / name
        if not root.is_dir():
            raise UserError(
                f"the benchmarks folder {self.folder} has no {name}, which task {task!r} reads; "
                "add a copy laid out like the hub repository of that name, or leave the task out"
            )
        whole = hashlib.sha256()
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            whole.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
        return whole.hexdigest()
