"""A sweep's YAML file, read strictly: a misspelt key or a bad window fails before any model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sa_patch.errors import UserError
from sa_patch.harness.embedded import DEFAULT_MODEL
from sa_patch.kernels import check_backend
from sa_patch.patching.layers import parse_layers
from sa_patch.patching.patch import DECODE_MODES
from sa_patch.patterns import Pattern, make_pattern, parse_pattern
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.registry import parameters, pattern_class, suggest
from sa_patch.resources import configs_dir

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
TOP_KEYS = (
    *("name", "model", "dtype", "windows", "methods", "tasks", "limit", "num_fewshot"),
    *("gen_kwargs", "batch_size", "decode", "layers", "backend"),
)


@dataclass(frozen=True)
class ModelSpec:
    """Which weights to load, and how."""

    pretrained: str = DEFAULT_MODEL
    dtype: str = "auto"
    revision: str | None = None
    gguf_file: str | None = None
    device: str | None = None
    device_map: str | None = None


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
    patterns: tuple[Pattern, ...]
    tasks: tuple[TaskSpec, ...]
    batch_size: int = 1
    decode: str = "full"
    layers: tuple[int, ...] | None = None
    backend: str = "auto"

    def with_limit(self, limit: int | None) -> SweepConfig:
        """The same sweep with every task cut to its first `limit` items (None changes nothing)."""
        if limit is None:
            return self
        whole_number(limit, "--limit", 1)
        tasks = tuple(dataclasses.replace(task, limit=limit) for task in self.tasks)
        return dataclasses.replace(self, tasks=tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest, patterns in their text form."""
        plain = dataclasses.asdict(dataclasses.replace(self, patterns=()))
        plain["patterns"] = [str(pattern) for pattern in self.patterns]
        plain["layers"] = None if self.layers is None else list(self.layers)
        return plain


def find_config(name: str) -> Path:
    """The YAML file a user means: a path, or the bare name of a packaged one (``demo``).

    Raises:
        UserError: if neither exists.
    """
    path = Path(name).expanduser()
    if path.is_file():
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
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable YAML file: {where}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return parse_config(raw, default_name=path.stem)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_config(raw: Any, default_name: str = "sweep") -> SweepConfig:
    """Turn the mapping of a YAML file into a checked `SweepConfig`.

    Raises:
        UserError: for anything unknown, missing or not allowed, and for an empty grid.
    """
    top = _mapping(raw, "the sweep file", TOP_KEYS)
    dtype = choice(top.get("dtype", "auto"), "dtype", DTYPES)
    windows = tuple(
        whole_number(window, "every window", 1) for window in _listed(top.get("windows"), "windows")
    )
    patterns = unique(
        pattern
        for entry in _listed(top.get("methods"), "methods")
        for pattern in _patterns(entry, windows)
    )
    tasks = unique(_task(entry, top) for entry in _listed(top.get("tasks"), "tasks"))
    models = unique(_model(entry, dtype) for entry in _listed(top.get("model"), "model"))
    for what, found in (("methods", patterns), ("tasks", tasks)):
        if not found:
            raise UserError(f"the grid is empty: {what!r} lists nothing to run")
    return SweepConfig(
        name=_text(top.get("name", default_name), "name"),
        models=models or (ModelSpec(dtype=dtype),),
        patterns=tuple(patterns),
        tasks=tuple(tasks),
        batch_size=whole_number(top.get("batch_size", 1), "batch_size", 1),
        decode=choice(top.get("decode", "full"), "decode", DECODE_MODES),
        layers=_layers(top.get("layers")),
        backend=check_backend(_text(top.get("backend", "auto"), "backend")),
    )


def _patterns(entry: Any, windows: Sequence[int]) -> list[Pattern]:
    """The patterns of one entry of ``methods``."""
    if isinstance(entry, str) and ":" in entry:
        return [parse_pattern(entry)]
    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, Mapping) or "method" not in entry:
        raise UserError(f"an entry of 'methods' is a name or has a 'method' key, got {entry!r}")
    params = dict(entry)
    name = params.pop("method")
    takes = parameters(pattern_class(name))
    own_windows = _listed(params.pop("windows", None), "windows") or list(windows)
    seeds: list[Any] = _listed(params.pop("seeds", None), "seeds") or [None]
    if seeds != [None] and "seed" not in takes:
        raise UserError(f"method {name!r} draws nothing at random, so it takes no 'seeds'")
    grid: list[Any] = [None]
    if "window" in takes and not {"window", "block_size"} & set(params):
        if not own_windows:
            raise UserError(f"the grid is empty: method {name!r} needs 'windows', for example [64]")
        grid = own_windows
    return [
        make_pattern(name, **params, **_given(window=window, seed=seed))
        for seed in seeds
        for window in grid
    ]


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _task(entry: Any, top: Mapping[str, Any]) -> TaskSpec:
    if isinstance(entry, str):
        entry = {"task": entry}
    own = _mapping(entry, "an entry of 'tasks'", ["task", "limit", "num_fewshot", "gen_kwargs"])
    if "task" not in own:
        raise UserError(f"an entry of 'tasks' is a name or has a 'task' key, got {entry!r}")
    name = own["task"]
    limit = own.get("limit", top.get("limit"))
    fewshot = own.get("num_fewshot", top.get("num_fewshot"))
    gen_kwargs = {
        **_any_mapping(top.get("gen_kwargs"), "gen_kwargs"),
        **_any_mapping(own.get("gen_kwargs"), f"gen_kwargs of {name}"),
    }
    return TaskSpec(
        task=_text(name, "task"),
        limit=None if limit is None else whole_number(limit, f"limit of {name}", 1),
        num_fewshot=None if fewshot is None else whole_number(fewshot, f"num_fewshot of {name}", 0),
        gen_kwargs=gen_kwargs,
    )


def _model(entry: Any, dtype: str) -> ModelSpec:
    if isinstance(entry, str):
        return ModelSpec(pretrained=_text(entry, "model"), dtype=dtype)
    known = [item.name for item in dataclasses.fields(ModelSpec)]
    own = {"dtype": dtype, **_mapping(entry, "'model'", known)}
    if "pretrained" not in own:
        raise UserError("'model' needs 'pretrained': a hub id, a folder or smollm2-135m")
    choice(own["dtype"], "dtype", DTYPES)
    for key, value in own.items():
        if value is not None:
            _text(value, f"model {key}")
    return ModelSpec(**own)


def _layers(raw: Any) -> tuple[int, ...] | None:
    """Sorted indices; whether the model has such layers shows once it is loaded."""
    if raw is None:
        return None
    chosen = tuple(sorted(parse_layers(raw)))
    if not chosen:
        raise UserError(f"layers {raw!r} names no layer; leave it out to patch all of them")
    return chosen


def unique(items: Any) -> tuple[Any, ...]:
    """The items in their order, equal ones once."""
    kept: list[Any] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return tuple(kept)


def _mapping(raw: Any, what: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise UserError(f"{what} must be a mapping of keys to values, got {raw!r}")
    for key in raw:
        if key not in known:
            near = suggest(str(key), list(known))
            raise UserError(f"unknown key {key!r} in {what}{near} known: {', '.join(known)}")
    return dict(raw)


def _any_mapping(raw: Any, what: str) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise UserError(f"{what} must be a mapping of keys to values, got {raw!r}")
    return dict(raw)


def _listed(raw: Any, what: str) -> list[Any]:
    """A list as it is, a single value as a list of one, nothing as an empty list."""
    if raw is None:
        return []
    if isinstance(raw, list):
        return raw
    if isinstance(raw, (str, int, float, Mapping)):
        return [raw]
    raise UserError(f"{what!r} must be a list, got {raw!r}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} must be a non-empty text, got {value!r}")
    return value


def choice(value: Any, what: str, allowed: Sequence[str]) -> str:
    """`value` if it is one of `allowed`, else a `UserError` with the nearest one."""
    if value not in allowed:
        near = suggest(str(value), list(allowed))
        raise UserError(f"unknown {what} {value!r}{near} allowed: {', '.join(allowed)}")
    return str(value)
