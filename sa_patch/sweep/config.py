"""A sweep's YAML file, read strictly: a misspelt key or a bad window fails before any model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from sa_patch.errors import UserError, suggest
from sa_patch.files.packaged import configs_dir
from sa_patch.files.settings import (
    LISTED,
    STDIN,
    Positive,
    Settings,
    Text,
    as_tuple,
    one_of,
    read_yaml,
    text_is,
)
from sa_patch.kernels import check_backend
from sa_patch.models.embedded import DEFAULT_MODEL
from sa_patch.models.loading import DTYPES
from sa_patch.patching import Schedule
from sa_patch.patching.patch import DECODE_MODES
from sa_patch.patterns import Full, Pattern
from sa_patch.patterns.base import whole_number
from sa_patch.sweep.grid import Layers, MethodSpec, Windows, read_methods, same_word
from sa_patch.sweep.worker_resources import WorkerResources

Dtype = Annotated[str, one_of("dtype", DTYPES)]
Entry = TypeVar("Entry")
Shots = Annotated[int, Field(ge=0)]
METADATA_EXAMPLE = """for example '{"max_seq_lengths": [1024, 4096]}'"""


def _as_json(value: Any) -> Any:
    """The value as a cell's file gives it back: keys of mappings are text there."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise PydanticCustomError(
            "json", "made of text, finite numbers, true, false, null, lists and mappings"
        ) from None


Keywords = Annotated[
    dict[str, Any],
    BeforeValidator(lambda value: {} if value is None else value),
    BeforeValidator(_as_json),
]


class ModelSpec(Settings):
    """Which weights to load, and how; `resources` are those of a cluster's worker."""

    pretrained: Text
    dtype: Dtype = "auto"
    revision: Text | None = None
    gguf_file: Text | None = None
    device: Text | None = None
    device_map: Text | None = None
    resources: WorkerResources = WorkerResources()


class TaskSettings(Settings):
    """What changes the result of a task, beside its name.

    Args:
        metadata: for the functions that make a task's documents. Each of its ``max_seq_lengths`` is
            a cell of its own.
        apply_chat_template: put prompts into the template of the model's tokenizer.
        truncation: where prompts are cut that are too long: "left", as lm-eval does, or "middle",
            as LongBench does.
        max_prompt_tokens: of a prompt, beside the model's own limit.
    """

    limit: Positive | None = None
    num_fewshot: Shots | None = None
    gen_kwargs: Keywords = {}
    metadata: Keywords = {}
    apply_chat_template: bool = False
    system_instruction: Text | None = None
    fewshot_as_multiturn: bool = False
    truncation: Literal["left", "middle"] = "left"
    max_prompt_tokens: Positive | None = None


class TaskSpec(TaskSettings):
    """One lm-eval task or group, with the settings that change its result."""

    task: Text


class SweepConfig(TaskSettings):
    """A whole sweep: every model with every pattern on every task.

    Args:
        name: of the run and its figures; the file's name by default.
        dtype, resources: of each model that has none of its own.
        limit, num_fewshot, ... (those of `TaskSettings`): of each task that has none of its own.
        windows: of each method that has none of its own.
        models: "model" in the file, a list or a single one.
        layers: that take a method's pattern where the method has none of its own.
        batch_size: sequences of a forward pass at most, and `batch_tokens` their tokens.
        decode, backend: see `patch_model`.
    """

    # What follows is completed by what stands before it.
    name: Text = "sweep"
    dtype: Dtype = "auto"
    resources: WorkerResources = WorkerResources()
    windows: Windows = ()
    models: Annotated[tuple[Annotated[ModelSpec, text_is("pretrained")], ...], LISTED] = Field(
        default=(ModelSpec(pretrained=DEFAULT_MODEL),), alias="model", validate_default=True
    )
    methods: tuple[MethodSpec, ...] = Field(default=(), validate_default=True)
    tasks: Annotated[tuple[Annotated[TaskSpec, text_is("task")], ...], LISTED] = Field(
        default=(), validate_default=True
    )
    batch_size: Positive = 1
    batch_tokens: Positive | None = None
    decode: Annotated[str, one_of("decode", DECODE_MODES)] = "full"
    layers: Layers = Schedule()
    backend: Annotated[Text, AfterValidator(check_backend)] = "auto"

    @field_validator("models")
    @classmethod
    def _complete_models(
        cls, models: tuple[ModelSpec, ...], info: ValidationInfo
    ) -> tuple[ModelSpec, ...]:
        models = models or (ModelSpec(pretrained=DEFAULT_MODEL),)
        return _unique(model.completed(info.data) for model in models)

    @field_validator("methods", mode="plain")
    @classmethod
    def _read_methods(cls, entries: Any, info: ValidationInfo) -> tuple[MethodSpec, ...]:
        methods = read_methods(as_tuple(entries), info.data.get("windows", ()))
        return _not_empty(methods, "methods")

    @field_validator("tasks")
    @classmethod
    def _complete_tasks(
        cls, tasks: tuple[TaskSpec, ...], info: ValidationInfo
    ) -> tuple[TaskSpec, ...]:
        completed = _unique(task.completed(info.data) for task in tasks)
        for task in completed:
            if task.fewshot_as_multiturn and not task.apply_chat_template:
                raise UserError(
                    f"task {task.task!r}: fewshot_as_multiturn means turns of a chat, so it needs "
                    "apply_chat_template: true"
                )
        return _not_empty(completed, "tasks")

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns, each once, whichever layers take them."""
        return _unique(method.pattern for method in self.methods)

    def layers_of(self, method: MethodSpec) -> Schedule:
        """The layers that take a method's pattern.

        Full attention has none to choose, so that a mapping, which may give layers to others, is
        not for it.
        """
        if isinstance(method.pattern, Full) and self.layers.own is not None:
            return Schedule()
        return self.layers if method.layers is None else method.layers

    def with_metadata(self, text: str | None) -> SweepConfig:
        """The same sweep with metadata, a JSON object, over that of the tasks that have some, or of
        all tasks where none has (None changes nothing)."""
        if text is None:
            return self
        try:
            metadata = _as_json(json.loads(text))
        except PydanticCustomError as error:
            raise UserError(f"--metadata must be {error}; got {text}") from None
        except ValueError as error:
            raise UserError(f"--metadata is no JSON ({error}); {METADATA_EXAMPLE}") from None
        if not isinstance(metadata, dict):
            raise UserError(f"--metadata must be a JSON object, got {text}; {METADATA_EXAMPLE}")
        every = not any(task.metadata for task in self.tasks)
        tasks = tuple(
            task.model_copy(update={"metadata": {**task.metadata, **metadata}})
            if task.metadata or every
            else task
            for task in self.tasks
        )
        return self.model_copy(update={"tasks": tasks})

    def with_limit(self, limit: int | None) -> SweepConfig:
        """The same sweep with every task cut to its first `limit` items (None changes nothing)."""
        if limit is None:
            return self
        whole_number(limit, "--limit", 1)
        tasks = tuple(task.model_copy(update={"limit": limit}) for task in self.tasks)
        return self.model_copy(update={"tasks": tasks})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest, patterns in their text form."""
        as_they_are = {"name", "models", "tasks", "batch_size", "batch_tokens", "decode", "backend"}
        return {
            **self.model_dump(include=as_they_are),
            "patterns": [method.to_plain() for method in self.methods],
            "layers": self.layers.to_plain(),
        }


def _not_empty(entries: tuple[Entry, ...], what: str) -> tuple[Entry, ...]:
    if not entries:
        raise UserError(f"the grid is empty: {what!r} lists nothing to run")
    return entries


def _unique(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries in their order, equal ones once."""
    kept: list[Entry] = []
    for entry in entries:
        if entry not in kept:
            kept.append(entry)
    return tuple(kept)


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
    if isinstance(raw, Mapping):
        raw = {"name": default_name, **same_word(raw, "patterns", "methods")}
    return SweepConfig.read(raw, "the sweep file")
