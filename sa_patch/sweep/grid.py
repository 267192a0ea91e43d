"""The entries of a sweep's ``methods``: which patterns each of them stands for."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.schedule_file import read_layers
from sa_patch.files.yaml_values import known_mapping, listed, text
from sa_patch.patching import Schedule
from sa_patch.patterns import (
    Full,
    Pattern,
    fit_budget,
    make_pattern,
    parse_pattern,
    seed_of,
    split_budget,
    with_seed,
)
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.registry import parameters, pattern_class

SPLIT = "split"
_SPLIT_KEYS = ("total", "sinks", "local", "rest", "seeds")
BUDGET = "budget"
_BUDGET_KEYS = ("families", "n", "shares", "group", "seeds")


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


def read_methods(entries: Iterable[Any], windows: Sequence[int]) -> tuple[MethodSpec, ...]:
    """Every pattern of every entry, equal ones once.

    An entry is a text form, a method's name, or a mapping with a ``method`` (a name, a text form,
    "split" or "budget"), its parameters, and optionally ``windows``, ``seeds`` and ``layers``.

    Raises:
        UserError: for anything unknown or not allowed.
    """
    found = {spec: None for entry in entries for spec in _read_entry(entry, windows)}
    return tuple(found)


def _read_entry(entry: Any, windows: Sequence[int]) -> list[MethodSpec]:
    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, Mapping) or "method" not in entry:
        raise UserError(f"an entry of 'methods' is a name or has a 'method' key, got {entry!r}")
    params = dict(entry)
    method = params.pop("method")
    layers = params.pop("layers", None)
    schedule = None if layers is None else read_layers(layers)
    if isinstance(method, str) and set(":+") & set(method):
        patterns = _from_text(method, params)
    elif method == SPLIT:
        patterns = _from_split(params)
    elif method == BUDGET:
        patterns = _from_budget(params)
    else:
        patterns = _from_name(method, params, windows)
    if schedule is not None and any(isinstance(pattern, Full) for pattern in patterns):
        raise UserError(
            "full attention has no layers to choose; name the sparse method, and give it "
            "layers: {0-3: full}"
        )
    return [MethodSpec(pattern, schedule) for pattern in patterns]


def _from_text(method: str, params: Mapping[str, Any]) -> list[Pattern]:
    given = known_mapping(params, f"the entry of {method!r}", ["seeds"])
    return _seeded([parse_pattern(method)], given.get("seeds"), method)


def _from_split(params: Mapping[str, Any]) -> list[Pattern]:
    given = known_mapping(params, "the entry of 'split'", _SPLIT_KEYS)
    totals = listed(given.pop("total", None), "total")
    if not totals:
        raise UserError("method 'split' needs 'total', the keys to share out, for example [64]")
    seeds = given.pop("seeds", None)
    if "rest" in given:
        text(given["rest"], "rest")
    return _seeded([split_budget(total, **given) for total in totals], seeds, SPLIT)


def _from_budget(params: Mapping[str, Any]) -> list[Pattern]:
    """Of every family the largest pattern within every share of full attention's FLOPs.

    Families may mix: the random ones take the seeds, the others stand once.
    """
    given = known_mapping(params, "the entry of 'budget'", _BUDGET_KEYS)
    families, lengths = listed(given.get("families"), "families"), listed(given.get("n"), "n")
    shares = [_share(value) for value in listed(given.get("shares"), "shares")]
    for key, values, example in (
        ("families", families, '["swa:{}", "sinks:4+psa:{}"]'),
        ("n", lengths, "[4096]"),
        ("shares", shares, "[1/16, 1/8]"),
    ):
        if not values:
            raise UserError(f"method 'budget' needs {key!r}, for example {example}")
    group = whole_number(given.get("group", 1), "group", 1)
    found = [
        fit_budget(family, length, share, group)
        for length, family, share in itertools.product(lengths, families, shares)
    ]
    seeds = listed(given.get("seeds"), "seeds")
    drawn = [pattern for pattern in found if seed_of(pattern) is not None]
    if seeds and not drawn:
        raise UserError("none of the families draws anything at random, so leave 'seeds' out")
    return [pattern for pattern in found if pattern not in drawn] + _seeded(drawn, seeds, BUDGET)


def _share(value: Any) -> Any:
    """The value of a fraction in text, since YAML has none; all else as it is, to be checked."""
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"shares are written 1/8 or 0.125, got {value!r}") from None


def _from_name(method: Any, params: dict[str, Any], windows: Sequence[int]) -> list[Pattern]:
    takes = parameters(pattern_class(method))
    own = listed(params.pop("windows", None), "windows") or list(windows)
    seeds = params.pop("seeds", None)
    grid: list[dict[str, Any]] = [{}]
    if "window" in takes and _open_to_windows(method, params):
        if not own and _needs_window(method):
            raise UserError(
                f"the grid is empty: method {method!r} needs 'windows', for example [64]"
            )
        grid = [{"window": window} for window in own] or [{}]
    return _seeded([make_pattern(method, **params, **each) for each in grid], seeds, method)


def _open_to_windows(method: str, params: Mapping[str, Any]) -> bool:
    """Whether the sweep's windows can complete the parameters that an entry spells out."""
    if "window" in params:
        return False
    builder = getattr(pattern_class(method), "from_window", None)
    return builder is None or set(params) <= {*inspect.signature(builder).parameters}


def _needs_window(method: str) -> bool:
    fields = dataclasses.fields(pattern_class(method))
    return any(field.default is dataclasses.MISSING for field in fields)


def _seeded(patterns: Sequence[Pattern], seeds: Any, method: str) -> list[Pattern]:
    """The patterns with every one of the seeds."""
    chosen = listed(seeds, "seeds")
    if not chosen:
        return list(patterns)
    for seed in chosen:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UserError(f"seeds must be whole numbers, got {seed!r}")
    for pattern in patterns:
        if seed_of(pattern) is None:
            raise UserError(f"method {method!r} draws nothing at random, so it takes no 'seeds'")
    return [with_seed(pattern, seed) for seed, pattern in itertools.product(chosen, patterns)]
