"""The entries of a sweep's ``methods``: which patterns each of them stands for."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.schedule_file import read_layers
from sa_patch.files.settings import LISTED, Positive, Settings, Text, one_of, read_fraction
from sa_patch.kernels.visited_keys import visited_share
from sa_patch.patching import Schedule
from sa_patch.patterns import (
    Full,
    Pattern,
    fit_budget,
    flops_share,
    make_pattern,
    parse_pattern,
    seed_of,
    split_budget,
    with_seed,
)
from sa_patch.patterns.registry import is_text_form, parameters, pattern_class

Layers = Annotated[Schedule, PlainValidator(read_layers)]
Windows = Annotated[tuple[Positive, ...], LISTED]


@dataclass(frozen=True)
class MethodSpec:
    """One pattern of a sweep, and the layers that take it.

    Args:
        layers: None where the sweep's own layers hold.
    """

    pattern: Pattern
    layers: Schedule | None = None

    def to_plain(self) -> Any:
        """For the manifest: the text form, with the layers where it has its own."""
        if self.layers is None:
            return str(self.pattern)
        return {"pattern": str(self.pattern), "layers": self.layers.to_plain()}


class _Entry(Settings):
    """What every entry of ``methods`` may have.

    Args:
        method: a method's name, a text form, "split" or "budget".
        seeds: each pattern is taken with each of them.
        layers: that take the patterns, in place of the sweep's own.
    """

    method: Text
    seeds: Annotated[tuple[int, ...], LISTED] = ()
    layers: Layers | None = None

    def patterns(self, windows: Sequence[int]) -> list[Pattern]:
        """All that the entry stands for; `windows` are the sweep's."""
        raise NotImplementedError


class _TextEntry(_Entry):
    """A pattern in its text form."""

    def patterns(self, windows: Sequence[int]) -> list[Pattern]:
        return _seeded([parse_pattern(self.method)], self.seeds, self.method)


class _NamedEntry(_Entry, extra="allow"):
    """A method's name; all other keys are the method's parameters."""

    windows: Windows = ()

    def patterns(self, windows: Sequence[int]) -> list[Pattern]:
        parameters_given = self.model_extra or {}
        takes = parameters(pattern_class(self.method))
        grid: list[dict[str, Any]] = [{}]
        if "window" in takes and _open_to_windows(self.method, parameters_given):
            windows = self.windows or windows
            if not windows and _needs_window(self.method):
                raise UserError(
                    f"the grid is empty: method {self.method!r} needs 'windows', for example [64]"
                )
            grid = [{"window": window} for window in windows] or [{}]
        found = [make_pattern(self.method, **parameters_given, **each) for each in grid]
        return _seeded(found, self.seeds, self.method)


class _SplitEntry(_Entry):
    """Numbers of keys that sinks, a sliding window and another method share; see `split_budget`."""

    total: Annotated[tuple[Positive, ...], LISTED, Field(min_length=1)]
    sinks: int = 4
    local: float = 0.5
    rest: Text = "sa"

    def patterns(self, windows: Sequence[int]) -> list[Pattern]:
        found = [
            split_budget(total, sinks=self.sinks, local=self.local, rest=self.rest)
            for total in self.total
        ]
        return _seeded(found, self.seeds, self.method)


def _fraction(value: Any) -> Any:
    """The value of a fraction in text, since YAML has none; all else as it is, to be checked."""
    if not isinstance(value, str):
        return value
    share = read_fraction(value)
    if math.isnan(share):
        raise UserError(f"shares are written 1/8 or 0.125, got {value!r}")
    return share


# What a budget is a share of.
_COSTS = {"flops": flops_share, "visited": visited_share}


class _BudgetEntry(_Entry):
    """Of every family the largest pattern within every share of full attention's cost.

    Families may mix: the random ones take the seeds, the others stand once. See `fit_budget`.
    """

    families: Annotated[tuple[Text, ...], LISTED, Field(min_length=1)]
    n: Annotated[tuple[Positive, ...], LISTED, Field(min_length=1)]
    shares: Annotated[
        tuple[Annotated[float, BeforeValidator(_fraction)], ...], LISTED, Field(min_length=1)
    ]
    group: Positive = 1
    cost: Annotated[str, one_of("cost", tuple(_COSTS))] = "flops"

    def patterns(self, windows: Sequence[int]) -> list[Pattern]:
        found = [
            fit_budget(family, length, share, self.group, _COSTS[self.cost])
            for length, family, share in itertools.product(self.n, self.families, self.shares)
        ]
        drawn = [pattern for pattern in found if seed_of(pattern) is not None]
        if self.seeds and not drawn:
            raise UserError("none of the families draws anything at random, so leave 'seeds' out")
        alone = [pattern for pattern in found if pattern not in drawn]
        return alone + _seeded(drawn, self.seeds, self.method)


def read_methods(entries: Iterable[Any], windows: Sequence[int]) -> tuple[MethodSpec, ...]:
    """Every pattern of every entry, equal ones once.

    An entry is a text form, a pattern's name, or a mapping with a ``pattern`` (a name, a text form,
    "split" or "budget"; ``method`` means the same), its parameters, and optionally ``windows``,
    ``seeds`` and ``layers``.

    Raises:
        UserError: for anything unknown or not allowed.
    """
    found = {spec: None for entry in entries for spec in _read_entry(entry, windows)}
    return tuple(found)


def _read_entry(raw: Any, windows: Sequence[int]) -> list[MethodSpec]:
    if isinstance(raw, str):
        raw = {"method": raw}
    if isinstance(raw, Mapping):
        raw = same_word(raw, "pattern", "method")
    if not isinstance(raw, Mapping) or "method" not in raw:
        raise UserError(f"an entry of 'patterns' is a name or has a 'pattern' key, got {raw!r}")
    method = raw["method"]
    entry = _kind_of(method).read(raw, f"the entry of {method!r}")
    patterns = entry.patterns(windows)
    if entry.layers is not None and any(isinstance(pattern, Full) for pattern in patterns):
        raise UserError(
            "full attention has no layers to choose; name the sparse method, and give it "
            "layers: {0-3: full}"
        )
    return [MethodSpec(pattern, entry.layers) for pattern in patterns]


def same_word(raw: Mapping[Any, Any], word: str, older: str) -> Mapping[Any, Any]:
    """A mapping with the key `older` where it has `word`, which means the same.

    Raises:
        UserError: if it has both.
    """
    if word not in raw:
        return raw
    if older in raw:
        raise UserError(f"{word!r} and {older!r} mean the same; give one of them")
    return {older if key == word else key: value for key, value in raw.items()}


def _kind_of(method: Any) -> type[_Entry]:
    if isinstance(method, str) and is_text_form(method):
        return _TextEntry
    if method == "split":
        return _SplitEntry
    return _BudgetEntry if method == "budget" else _NamedEntry


def _open_to_windows(method: str, params: Mapping[str, Any]) -> bool:
    """Whether the sweep's windows can complete the parameters that an entry spells out."""
    if "window" in params:
        return False
    builder = getattr(pattern_class(method), "from_window", None)
    return builder is None or set(params) <= {*inspect.signature(builder).parameters}


def _needs_window(method: str) -> bool:
    fields = dataclasses.fields(pattern_class(method))
    return any(field.default is dataclasses.MISSING for field in fields)


def _seeded(patterns: Sequence[Pattern], seeds: Sequence[int], method: str) -> list[Pattern]:
    """The patterns with every one of the seeds."""
    if not seeds:
        return list(patterns)
    for pattern in patterns:
        if seed_of(pattern) is None:
            raise UserError(f"method {method!r} draws nothing at random, so it takes no 'seeds'")
    return [with_seed(pattern, seed) for seed, pattern in itertools.product(seeds, patterns)]
