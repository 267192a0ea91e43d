"""Names for what is compared: one series per method and set of parameters, one name per task."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sa_patch.harness.results import Cell

METHOD_LABELS = {"full": "Full attention", "sa": "SA", "swa": "SWA", "moba": "MoBA"}
METHOD_ORDER = tuple(METHOD_LABELS)
# What a sweep varies along the axis; any other parameter makes a series of its own.
AXIS_PARAMETERS = ("window", "block_size", "seed")
# Settings that part two runs of one method. Full attention is the same under all but the first
# three: it has no layers to choose, and decoding sees every key anyway.
MODEL_SETTINGS = ("model", "model_name", "dtype")
PATTERN_SETTINGS = ("layers", "decode", "backend")
TASK_SETTINGS = ("limit", "num_fewshot", "gen_kwargs", "task_version")


@dataclass(frozen=True)
class Series:
    """One line of a figure. ``key`` tells series apart, ``label`` names them for a reader, and
    ``rank`` orders them (full, sa, swa, moba, then others by name)."""

    key: str
    label: str
    method: str
    rank: tuple[int, str]

    @property
    def is_full(self) -> bool:
        return self.method == "full"


class Namer:
    """Series and task names for a set of cells: only what differs among them is spelt out."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._varied_settings = [
            key for key in ("model_name", "dtype", *PATTERN_SETTINGS) if _varies(cells, key)
        ]
        names = {(_text(c.setting, "model_name"), _text(c.setting, "model")) for c in cells}
        self._ambiguous = {
            name for name, _ in names if sum(name == other for other, _ in names) > 1
        }
        self._varied_task_settings: dict[str, list[str]] = {}
        for task in {cell.task for cell in cells}:
            of_task = [cell for cell in cells if cell.task == task]
            self._varied_task_settings[task] = [
                key for key in TASK_SETTINGS if len({_text(c.setting, key) for c in of_task}) > 1
            ]
        self._mixed = _mixed_variants(cells)

    def series(self, cell: Cell) -> Series:
        variant = strip_parameters(cell.setting["pattern"], AXIS_PARAMETERS)
        if variant in self._mixed:
            variant = self.seedless(cell)
        suffix = []
        for key in self._varied_settings:
            if cell.method == "full" and key in PATTERN_SETTINGS:
                continue
            value = _text(cell.setting, key)
            suffix.append(value if key in MODEL_SETTINGS else f"{key} {_shown(key, value)}")
        if _text(cell.setting, "model_name") in self._ambiguous:
            suffix.append(f"weights {_text(cell.setting, 'model')[-8:]}")
        label = ", ".join([_variant_label(variant), *suffix])
        order = METHOD_ORDER.index(cell.method) if cell.method in METHOD_ORDER else 99
        return Series(f"{variant}|{'|'.join(suffix)}", label, cell.method, (order, label))

    def task(self, cell: Cell) -> str:
        varied = self._varied_task_settings[cell.task]
        if not varied:
            return cell.task
        parts = (f"{key} {_text(cell.setting, key)}" for key in varied)
        return f"{cell.task} ({', '.join(parts)})"

    def seedless(self, cell: Cell) -> str:
        return strip_parameters(cell.setting["pattern"], ("seed",))


def strip_parameters(pattern: str, names: Sequence[str]) -> str:
    """``pattern`` (text form, composed ones too) without the parameters ``names``.

    ``strip_parameters("sa:window=64,seed=0,circular=False", ("window", "seed"))`` is
    ``"sa:circular=False"``.
    """
    value = r"[^,:;()+|&\s]*"
    text = re.sub(rf"\b(?:{'|'.join(names)})={value},?", "", pattern)
    return re.sub(r"[,:]+(?=$|[;()+|&\s])", "", text)


def _variant_label(variant: str) -> str:
    match = re.fullmatch(r"(\w+)(?::([^:;()+|&]*))?", variant)
    if match is None:
        return variant
    name = METHOD_LABELS.get(match[1], match[1])
    return f"{name} ({match[2].replace(',', ', ')})" if match[2] else name


def _mixed_variants(cells: Sequence[Cell]) -> set[str]:
    """Variants where one window stands for two different patterns (say, composed ones that split
    it differently): these must not be taken for two seeds of one."""
    seen: dict[tuple[str, Any], set[str]] = {}
    for cell in cells:
        text = cell.setting["pattern"]
        place = (strip_parameters(text, AXIS_PARAMETERS), cell.setting["window"])
        seen.setdefault(place, set()).add(strip_parameters(text, ("seed",)))
    return {variant for (variant, _), patterns in seen.items() if len(patterns) > 1}


def _varies(cells: Sequence[Cell], key: str) -> bool:
    counted = [cell for cell in cells if cell.method != "full" or key not in PATTERN_SETTINGS]
    return len({_text(cell.setting, key) for cell in counted}) > 1


def _text(setting: Mapping[str, Any], key: str) -> str:
    value = setting.get(key)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _shown(key: str, value: str) -> str:
    return "all" if key == "layers" and value == "null" else value
