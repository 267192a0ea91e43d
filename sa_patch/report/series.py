"""Names for what is compared: one series per method and set of parameters, one name per task."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sa_patch.report.variants import Variant, by_budget, by_split, family, in_full
from sa_patch.sweep.cells import PROMPT_SETTINGS
from sa_patch.sweep.results import Cell

METHOD_ORDER = ("full", "sa", "psa", "swa", "sinks", "moba", "block_topk", "union")
# Settings that part two runs of one method. Full attention is the same under all but the first
# three: it has no layers to choose, and decoding sees every key anyway.
MODEL_SETTINGS = ("model", "model_name", "dtype")
PATTERN_SETTINGS = ("layers", "decode", "backend")
# Characters of a schedule of layers that a label has room for.
LONGEST_LAYERS = 32
TASK_SETTINGS = ("limit", "num_fewshot", "gen_kwargs", "task_version", "data", *PROMPT_SETTINGS)


@dataclass(frozen=True)
class Series:
    """One line of a figure. ``key`` tells series apart, ``label`` names them for a reader, and
    ``rank`` orders them (by `METHOD_ORDER`, then by name). ``family`` names the methods that the
    series is composed of, such as ``sinks+swa+sa``; of a single method its name."""

    key: str
    label: str
    method: str
    rank: tuple[int, str]
    family: str

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
        self._variants = _variants(cells)

    def series(self, cell: Cell) -> Series:
        variant = self._variants[cell.setting["pattern"]]
        suffix = []
        for key in self._varied_settings:
            if cell.method == "full" and key in PATTERN_SETTINGS:
                continue
            value = _text(cell.setting, key)
            if key == "layers" and value == "null":
                continue  # all layers: what a reader takes a bare name for
            suffix.append(value if key in MODEL_SETTINGS else f"{key} {_shown(key, value)}")
        if _text(cell.setting, "model_name") in self._ambiguous:
            suffix.append(f"weights {_text(cell.setting, 'model')[-8:]}")
        label = ", ".join([variant.label, *suffix])
        order = METHOD_ORDER.index(cell.method) if cell.method in METHOD_ORDER else 99
        return Series(
            f"{variant.key}|{'|'.join(suffix)}",
            label,
            cell.method,
            (order, label),
            family(cell.setting["pattern"]),
        )

    def task(self, cell: Cell) -> str:
        varied = self._varied_task_settings[cell.task]
        if not varied:
            return cell.task
        parts = (f"{key} {_shown(key, _text(cell.setting, key))}" for key in varied)
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


def _variants(cells: Sequence[Cell]) -> dict[str, Variant]:
    """The variant of each pattern: as coarse as may be, but never one for two different patterns
    of one window on one task (say, unions that divide it differently): these are no two seeds."""
    found: dict[str, Variant] = {}
    left = {cell.setting["pattern"] for cell in cells}
    ways: tuple[Callable[[str], Variant], ...] = (by_budget, by_split, in_full)
    for way in ways:
        seen: dict[tuple[str, Any, str], set[str]] = {}
        for cell in cells:
            text = cell.setting["pattern"]
            if text in left:
                place = (way(text).key, cell.setting["window"], cell.task)
                seen.setdefault(place, set()).add(in_full(text).key)
        mixed = {key for (key, _, _), patterns in seen.items() if len(patterns) > 1}
        found |= {text: way(text) for text in left if way(text).key not in mixed}
        left -= set(found)
    return found


def _varies(cells: Sequence[Cell], key: str) -> bool:
    counted = [cell for cell in cells if cell.method != "full" or key not in PATTERN_SETTINGS]
    return len({_text(cell.setting, key) for cell in counted}) > 1


def _text(setting: Mapping[str, Any], key: str) -> str:
    value = setting.get(key)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _shown(key: str, value: str) -> str:
    if key == "data" and value != "null":
        return value[-8:]  # of a digest
    return _layers(json.loads(value)) if key == "layers" and value[:1] in '"{[' else value


def _layers(layers: Any) -> str:
    """A cell's layers: ``0-3,7``, or of a mapping ``0-3,7: full``; cut where it is long."""
    if isinstance(layers, dict):
        text = "; ".join(f"{indices}: {pattern}" for indices, pattern in layers.items())
    else:
        text = _ranges(layers) if isinstance(layers, list) else str(layers)
    if len(text) <= LONGEST_LAYERS:
        return text
    # Two long schedules may begin alike; the hash keeps their labels apart.
    return f"{text[: LONGEST_LAYERS - 8]}… #{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _ranges(indices: Sequence[int]) -> str:
    """``[0, 1, 2, 3, 7]`` as ``0-3,7``."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][-1] + 1:
            spans[-1][1:] = [index]
        else:
            spans.append([index])
    return ",".join("-".join(map(str, span)) for span in spans)
