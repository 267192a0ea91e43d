"""Read run folders: which cell files may be trusted, which may not and why."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.evaluation.tasks.names import current_name
from sa_patch.files.packed import packed_path, stored_files, stored_text, torn_lines
from sa_patch.sweep.cells import SCHEMA, cell_id
from sa_patch.sweep.counted_later import CountedLater

# Keys in a block, of those sizes that visited keys are counted for.
_VISITED_BLOCK = "16"
# What a report needs of a cell's identity, and the types it may have there.
SETTING_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "model_name": str,
    "pattern": str,
    "method": str,
    "window": (int, type(None)),
    "seed": (int, type(None)),
    "task": str,
}


@dataclass(frozen=True)
class Cell:
    """One trusted result: one model, pattern, seed and task.

    ``setting`` is the file's "cell" mapping (all that determines the result). ``value`` and
    ``stderr`` are in the metric's own unit (accuracies as fractions of 1). ``mean_keys`` and
    ``last_query_keys`` count visible keys per query; ``flops`` and ``full_flops`` are attention
    FLOPs of the prefill per sequence, of the pattern and of full attention on the same prompts;
    ``visited_share`` is what tiles of queries read in blocks of 16 keys, choosing included, of what
    they read under full attention.
    ``seconds`` is the time of the whole evaluation, ``model_seconds`` that of the model's calls
    per sequence that was run (the decoding of generated tokens included; see `reused_fraction`
    of `sa_patch.evaluation.metering.pattern_meter`).
    ``scores`` holds all of the task's metrics, by name with filter. Measured figures are ``None``
    where the file has none.
    """

    id: str
    run: str
    setting: Mapping[str, Any]
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    chance: float | None
    samples: int | None
    mean_keys: float | None
    last_query_keys: float | None
    prompt_mean: float | None
    flops: float | None
    full_flops: float | None
    visited_share: float | None
    saturated_fraction: float | None
    seconds: float | None
    model_seconds: float | None
    scores: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return str(self.setting["method"])

    @property
    def length(self) -> int | str | None:
        """What the task's metadata says of its prompts' length, if anything."""
        lengths = (self.setting.get("metadata") or {}).get("max_seq_lengths")
        return lengths[0] if isinstance(lengths, list) and lengths else None

    @property
    def task(self) -> str:
        """The task's present name, with its length behind it where that is a setting."""
        name = current_name(str(self.setting["task"]))
        return name if self.length is None else f"{name}_{self.length}"


@dataclass(frozen=True)
class SetAside:
    """A file in ``cells/``, or a line of those packed, that no figure uses, and the reason."""

    path: Path
    reason: str

    @property
    def damaged(self) -> bool:
        """Whether the file is not what a sweep writes, rather than a failed or unplanned cell."""
        return self.reason.startswith(("torn", "foreign"))


@dataclass(frozen=True)
class Run:
    """A run folder as it stands: its manifest, its trusted cells, and what is not there.

    ``cells`` come in the order of the plan. ``planned`` is ``None`` if the manifest names no plan;
    ``missing`` are the planned ids without a trusted cell (those set aside included).
    """

    path: Path
    manifest: Mapping[str, Any]
    cells: tuple[Cell, ...]
    set_aside: tuple[SetAside, ...] = ()
    planned: tuple[str, ...] | None = None
    missing: tuple[str, ...] = field(default=())


def load_run(path: Path | str) -> Run:
    """Read one run folder. Incomplete runs give what is there; nothing is guessed.

    Raises ``UserError`` if the folder is missing, is no run folder, has a broken manifest or holds
    no trusted cell.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    planned = _planned(manifest)
    cells: list[Cell] = []
    set_aside: list[SetAside] = []
    later = CountedLater(folder)
    for file in stored_files(folder / "cells"):
        outcome = _read_cell(file, folder, planned)
        if isinstance(outcome, Cell):
            setting = outcome.setting
            counts = later.find(setting["pattern"], setting.get("layers"), outcome.prompt_mean)
            if counts:
                outcome = replace(outcome, visited_share=_visited_share(counts))
        if isinstance(outcome, Cell):
            cells.append(outcome)
        else:
            set_aside.append(outcome)
    done = {cell.id for cell in cells}
    missing = tuple(identifier for identifier in planned or () if identifier not in done)
    if missing or planned is None:
        # Else what torn lines held has been done again.
        set_aside += _torn_lines(folder / "cells")
    if not cells:
        detail = (
            f"{len(set_aside)} cell files were set aside, {set_aside[0].path.name}: "
            f"{set_aside[0].reason}"
            if set_aside
            else "no cell has been finished yet"
        )
        raise UserError(
            f"nothing to report in {folder}: {detail}; run the sweep again with the same --out "
            "to compute what is missing"
        )
    if planned is not None:
        place = {identifier: index for index, identifier in enumerate(planned)}
        cells.sort(key=lambda cell: place[cell.id])
    return Run(folder, manifest, tuple(cells), tuple(set_aside), planned, missing)


def merge_cells(runs: Iterable[Run]) -> tuple[list[Cell], list[SetAside]]:
    """All cells of several runs; a cell that two runs share (same id) enters once, the first."""
    kept: dict[str, Cell] = {}
    repeated: list[SetAside] = []
    for run in runs:
        for cell in run.cells:
            first = kept.setdefault(cell.id, cell)
            if first is not cell and first.value != cell.value:
                repeated.append(
                    SetAside(
                        run.path / "cells" / f"{cell.id}.json",
                        f"the same cell has another value ({first.value:g}, here {cell.value:g}) "
                        f"in {first.run}, which is used",
                    )
                )
    return list(kept.values()), repeated


def _read_manifest(folder: Path) -> Mapping[str, Any]:
    advice = "name a folder that `sa-patch sweep` has written"
    if not folder.is_dir():
        raise UserError(f"no run folder at {folder}; {advice}")
    file = folder / "manifest.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder (it has no manifest.json); {advice}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); run the sweep again with the same --out to mend it"
        ) from error
    if not isinstance(manifest, dict):
        raise UserError(f"{file} is not a run's manifest (no JSON object); {advice}")
    return manifest


def _planned(manifest: Mapping[str, Any]) -> tuple[str, ...] | None:
    planned = manifest.get("planned")
    if not isinstance(planned, list):
        return None
    return tuple(str(identifier) for identifier in planned)


def _torn_lines(folder: Path) -> list[SetAside]:
    return [
        SetAside(packed_path(folder), f"torn: line {number} is not a complete JSON object")
        for number in torn_lines(folder)
    ]


def _read_cell(file: Path, folder: Path, planned: tuple[str, ...] | None) -> Cell | SetAside:
    try:
        data = json.loads(stored_text(file))
    except (OSError, ValueError):
        return SetAside(file, "torn: not a complete JSON file")
    reason = _distrust(data, file.stem, planned)
    if reason is not None:
        return SetAside(file, reason)
    primary = data["primary"]
    measured = data["measured"]
    lengths = measured.get("prompt_lengths")
    sequences = _number(measured.get("sequences"))

    def per_sequence(key: str) -> float | None:
        total = _number(measured.get(key))
        return None if total is None or not sequences else total / sequences

    samples = _number(data.get("samples"))
    return Cell(
        id=data["id"],
        run=str(folder),
        setting=data["cell"],
        metric=str(primary.get("metric")),
        value=float(primary["value"]),
        stderr=_number(primary.get("stderr")),
        higher_is_better=bool(primary.get("higher_is_better", True)),
        chance=_number(primary.get("chance")),
        samples=None if samples is None else int(samples),
        mean_keys=_number(measured.get("mean_keys_per_query")),
        last_query_keys=_number(measured.get("last_query_keys")),
        prompt_mean=_number(lengths.get("mean")) if isinstance(lengths, dict) else None,
        flops=per_sequence("attention_flops"),
        full_flops=per_sequence("full_attention_flops"),
        visited_share=_visited_share(measured),
        saturated_fraction=_number(measured.get("saturated_fraction")),
        seconds=_number(data.get("seconds")),
        model_seconds=_seconds_per_run_sequence(measured),
        scores={key: _number(score) for key, score in (data.get("scores") or {}).items()},
    )


def _seconds_per_run_sequence(measured: Mapping[str, Any]) -> float | None:
    """None where all answers were reused, too."""
    total, sequences = _number(measured.get("model_seconds")), _number(measured.get("sequences"))
    run = round((sequences or 0) * (1 - (_number(measured.get("reused_fraction")) or 0)))
    return None if total is None or not run else total / run


def _visited_share(measured: Mapping[str, Any]) -> float | None:
    """Visited keys over those of full attention; None for runs from before they were counted."""
    own, full = measured.get("visited_keys"), measured.get("full_visited_keys")
    if not isinstance(own, dict) or not isinstance(full, dict):
        return None
    keys, dense = _number(own.get(_VISITED_BLOCK)), _number(full.get(_VISITED_BLOCK))
    return None if keys is None or not dense else keys / dense


def _distrust(data: Any, stem: str, planned: tuple[str, ...] | None) -> str | None:
    """Why a parsed cell file is not to be used; ``None`` if it may be."""
    if not isinstance(data, dict) or not isinstance(data.get("cell"), dict):
        return "foreign: not a cell file of sa-patch"
    if data.get("schema") != SCHEMA:
        return f"foreign: schema {data.get('schema')!r}, this version reads {SCHEMA}"
    if data.get("id") != stem or cell_id(data["cell"]) != stem:
        return "foreign: its name is not the hash of the cell it describes"
    if planned is not None and stem not in planned:
        return "unplanned: not in the plan of this run (left from another configuration)"
    for key, kind in SETTING_TYPES.items():
        if key not in data["cell"] or not isinstance(data["cell"][key], kind):
            return f"foreign: its cell has no usable {key!r}"
    if data.get("status") == "failed":
        return f"failed: {data.get('error') or 'no reason recorded'}"
    if data.get("status") != "done":
        return f"foreign: unknown status {data.get('status')!r}"
    primary = data.get("primary")
    if not isinstance(primary, dict) or _number(primary.get("value")) is None:
        return "failed: its primary score is not a finite number"
    if not isinstance(data.get("measured"), dict):
        return "foreign: it lacks its measurements"
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
