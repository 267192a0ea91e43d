"""A sweep's YAML file, read strictly: a misspelt key or a bad window fails before any model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError, choice, suggest
from sa_patch.evaluation.calibration.schedule_file import read_layers
from sa_patch.files.packaged import configs_dir
from sa_patch.files.settings import STDIN, read_yaml
from sa_patch.files.yaml_values import any_mapping, known_mapping, listed, text, unique
from sa_patch.kernels import check_backend
from sa_patch.models.embedded import DEFAULT_MODEL
from sa_patch.models.loading import DTYPES
from sa_patch.patching import Schedule
from sa_patch.patching.patch import DECODE_MODES
from sa_patch.patterns import Full, Pattern
from sa_patch.patterns.base import whole_number
from sa_patch.sweep.grid import MethodSpec, read_methods
from sa_patch.sweep.worker_resources import WorkerResources, read_resources

TOP_KEYS = (
    *("name", "model", "dtype", "windows", "methods", "tasks", "limit", "num_fewshot"),
    *("gen_kwargs", "batch_size", "batch_tokens", "decode", "layers", "backend", "resources"),
)


@dataclass(frozen=True)
class ModelSpec:
    """Which weights to load, and how; `resources` are those of a cluster's worker."""

    pretrained: str = DEFAULT_MODEL
    dtype: str = "auto"
    revision: str | None = None
    gguf_file: str | None = None
    device: str | None = None
    device_map: str | None = None
    resources: WorkerResources = WorkerResources()


@dataclass(frozen=True)
class TaskSpec:
    """One lm-eval task or group, with the settings that change its result."""

    task: str
    limit: int | None = None
    num_fewshot: int | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepConfig:
    """A whole sweep: every model with every pattern on every task."""

    name: str
    models: tuple[ModelSpec, ...]
    methods: tuple[MethodSpec, ...]
    tasks: tuple[TaskSpec, ...]
    batch_size: int = 1
    batch_tokens: int | None = None
    decode: str = "full"
    layers: Schedule = Schedule()
    backend: str = "auto"

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns, each once, whichever layers take them."""
        return unique(method.pattern for method in self.methods)

    def layers_of(self, method: MethodSpec) -> Schedule:
        """The layers that take a method's pattern.

        Full attention has none to choose, so that a mapping, which may give layers to others, is
        not for it.
        """
        if isinstance(method.pattern, Full) and self.layers.own is not None:
            return Schedule()
        return self.layers if method.layers is None else method.layers

    def with_limit(self, limit: int | None) -> SweepConfig:
        """The same sweep with every task cut to its first `limit` items (None changes nothing)."""
        if limit is None:
            return self
        whole_number(limit, "--limit", 1)
        tasks = tuple(dataclasses.replace(task, limit=limit) for task in self.tasks)
        return dataclasses.replace(self, tasks=tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest, patterns in their text form."""
        plain = dataclasses.asdict(dataclasses.replace(self, methods=(), layers=Schedule()))
        del plain["methods"]
        plain["patterns"] = [method.to_plain() for method in self.methods]
        plain["layers"] = self.layers.to_plain()
        return plain


def find_config(name: str) -> Path:
    """The YAML file a user means: a path, the bare name of a packaged one (``demo``), or ``-`` for
    standard input.

    Raises:
        UserError: if neither exists.
    """
    path = Path(name).expanduser()
    if path.is_file() or path == STDIN:
        return path
    packaged = sorted(found.stem for found in configs_dir().glob("*.yaml"))
    if name in packaged:
        return configs_dir() / f"{name}.yaml"
    if path.is_dir():
        raise UserError(f"{name} is a folder; give a sweep's YAML file")
    near = suggest(name, packaged)
    raise UserError(
        f"no sweep file {name!r}{near} give a path to a YAML file, or one of: {', '.join(packaged)}"
    )


def load_config(name: str) -> SweepConfig:
    """Read and check a sweep's YAML file.

    Raises:
        UserError: for anything unknown, missing or not allowed, with the file's name.
    """
    path = find_config(name)
    raw = read_yaml(path)
    stdin = path == STDIN
    try:
        return parse_config(raw, default_name="sweep" if stdin else path.stem)
    except UserError as error:
        raise UserError(f"{'standard input' if stdin else path}: {error}") from error


def parse_config(raw: Any, default_name: str = "sweep") -> SweepConfig:
    """Turn the mapping of a YAML file into a checked `SweepConfig`.

    Raises:
        UserError: for anything unknown, missing or not allowed, and for an empty grid.
    """
    top = known_mapping(raw, "the sweep file", TOP_KEYS)
    dtype = choice(top.get("dtype", "auto"), "dtype", DTYPES)
    windows = tuple(
        whole_number(window, "every window", 1) for window in listed(top.get("windows"), "windows")
    )
    methods = read_methods(listed(top.get("methods"), "methods"), windows)
    tasks = unique(_task(entry, top) for entry in listed(top.get("tasks"), "tasks"))
    batch_tokens = top.get("batch_tokens")
    if batch_tokens is not None:
        whole_number(batch_tokens, "batch_tokens", 1)
    resources = read_resources(top.get("resources"), WorkerResources())
    models = unique(_model(entry, dtype, resources) for entry in listed(top.get("model"), "model"))
    for what, found in (("methods", methods), ("tasks", tasks)):
        if not found:
            raise UserError(f"the grid is empty: {what!r} lists nothing to run")
    return SweepConfig(
        name=text(top.get("name", default_name), "name"),
        models=models or (ModelSpec(dtype=dtype, resources=resources),),
        methods=methods,
        tasks=tuple(tasks),
        batch_size=whole_number(top.get("batch_size", 1), "batch_size", 1),
        batch_tokens=batch_tokens,
        decode=choice(top.get("decode", "full"), "decode", DECODE_MODES),
        layers=read_layers(top.get("layers")),
        backend=check_backend(text(top.get("backend", "auto"), "backend")),
    )


def _task(entry: Any, top: Mapping[str, Any]) -> TaskSpec:
    if isinstance(entry, str):
        entry = {"task": entry}
    own = known_mapping(
        entry, "an entry of 'tasks'", ["task", "limit", "num_fewshot", "gen_kwargs"]
    )
    if "task" not in own:
        raise UserError(f"an entry of 'tasks' is a name or has a 'task' key, got {entry!r}")
    name = own["task"]
    limit = own.get("limit", top.get("limit"))
    fewshot = own.get("num_fewshot", top.get("num_fewshot"))
    gen_kwargs = {
        **any_mapping(top.get("gen_kwargs"), "gen_kwargs"),
        **any_mapping(own.get("gen_kwargs"), f"gen_kwargs of {name}"),
    }
    return TaskSpec(
        task=text(name, "task"),
        limit=None if limit is None else whole_number(limit, f"limit of {name}", 1),
        num_fewshot=None if fewshot is None else whole_number(fewshot, f"num_fewshot of {name}", 0),
        gen_kwargs=gen_kwargs,
    )


def _model(entry: Any, dtype: str, resources: WorkerResources) -> ModelSpec:
    if isinstance(entry, str):
        return ModelSpec(text(entry, "model"), dtype, resources=resources)
    known = [item.name for item in dataclasses.fields(ModelSpec)]
    own = {"dtype": dtype, **known_mapping(entry, "'model'", known)}
    if "pretrained" not in own:
        raise UserError("'model' needs 'pretrained': a hub id, a folder or smollm2-135m")
    needs = read_resources(own.pop("resources", None), resources)
    choice(own["dtype"], "dtype", DTYPES)
    for key, value in own.items():
        if value is not None:
            text(value, f"model {key}")
    return ModelSpec(**own, resources=needs)
