"""What a search found: a YAML file for every place that takes a pattern, JSON, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sa_patch.errors import UserError
from sa_patch.evaluation.recovery import Interval, interval
from sa_patch.files.atomic_write import write_json, write_whole
from sa_patch.patching import format_layers
from sa_patch.sweep.search.options import Options
from sa_patch.sweep.search.quality import Kept, Patterns
from sa_patch.sweep.search.study import finished

SCHEMA = 1
HEAD = """\
# Written by sa-patch search. It goes wherever a pattern goes: --pattern FILE on the command line,
# patterns: [FILE] in a sweep, patch_model(model, "FILE").
"""
LAYERED_HEAD = """\
# Written by sa-patch search. It goes wherever layers go: --layers FILE on the command line,
# patch_model(model, layers=...) with its `layers`, {pattern: "sinks:4", layers: FILE} in a sweep
# (no layer takes the pattern that stands beside it).
"""


@dataclass(frozen=True)
class Finalist:
    """A candidate that is compared on held-out texts.

    Args:
        value: recovery on the texts of the search.
        flops, visited: shares of full attention's.
    """

    name: str
    patterns: Patterns
    value: float
    flops: float
    visited: float
    held_out: Kept | None = None

    @property
    def kept(self) -> Kept:
        assert self.held_out is not None
        return self.held_out

    def to_plain(self) -> dict[str, Any]:
        groups = {name: asdict(one) for name, one in self.kept.groups.items()}
        return {
            "name": self.name,
            "patterns": layers_of(self.patterns),
            "flops": self.flops,
            "visited": self.visited,
            "recovery": self.value,
            "held_out": {**groups, "mean": asdict(self.kept.mean)},
        }


def layers_of(patterns: Patterns) -> dict[str, list[int]]:
    """Layers by the text form of their pattern."""
    found: dict[str, list[int]] = {}
    for layer, pattern in patterns.items():
        found.setdefault(str(pattern), []).append(layer)
    return found


def write_result(
    options: Options,
    settings: Mapping[str, Any],
    studies: Mapping[str, optuna.Study],
    finalists: Sequence[Finalist],
    provenance: Mapping[str, Any],
    console: Console,
) -> list[Path]:
    """Write `found.yaml` and `search.json`, and print the table.

    Args:
        finalists: the winner of the search first, the best named method last; one where they are
            the same.

    Returns:
        The files.

    Raises:
        UserError: if they cannot be written.
    """
    found, named = finalists[0], finalists[-1]
    ahead = interval(
        found.kept.mean.value - named.kept.mean.value, found.kept.draws - named.kept.draws
    )
    content = {
        "schema": SCHEMA,
        "settings": dict(settings),
        "held_out_documents": options.held_out,
        "finalists": [one.to_plain() for one in finalists],
        "found_minus_named": asdict(ahead),
        "trials": {name: list(map(_plain, finished(study))) for name, study in studies.items()},
        "provenance": dict(provenance),
    }
    files = [options.folder / "found.yaml", options.folder / "search.json"]
    try:
        write_json(files[1], content)
        write_whole(files[0], _yaml(options, found, provenance).encode("utf-8"))
    except OSError as error:
        raise UserError(f"{options.folder} cannot be written ({error.strerror})") from error
    for one in finalists:
        own = layers_of(one.patterns).items()
        parts = [text if len(own) == 1 else f"{format_layers(at)}: {text}" for text, at in own]
        console.print(f"{one.name}: {'; '.join(parts)}", soft_wrap=True, highlight=False)
    console.print(_table(options, finalists))
    console.print(_verdict(finalists, ahead), soft_wrap=True, highlight=False)
    return files


def _plain(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "parameters": trial.params,
        **trial.user_attrs,
        "rungs": list(trial.intermediate_values.values()),
    }


def _yaml(options: Options, found: Finalist, provenance: Mapping[str, Any]) -> str:
    by_pattern = layers_of(found.patterns)
    layered = len(by_pattern) > 1
    content: dict[str, Any] = (
        {"layers": {format_layers(own): text for text, own in by_pattern.items()}}
        if layered
        else {"pattern": next(iter(by_pattern))}
    )
    content |= {
        "model": options.model,
        "n": options.n,
        "flops": round(found.flops, 5),
        "visited": round(found.visited, 5),
        "held_out_recovery": round(found.kept.mean.value, 5),
        "written": provenance["ended"],
        "commit": (provenance.get("git") or {}).get("commit"),
    }
    head = LAYERED_HEAD if layered else HEAD
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def _table(options: Options, finalists: Sequence[Finalist]) -> Table:
    groups = list(finalists[0].kept.groups)
    table = Table(
        title=f"recovery on {options.held_out} held-out documents of each kind, {options.n} "
        f"tokens,\nat {options.share} of full attention's {options.cost}",
        box=SIMPLE_HEAD,  # fits 80 columns
    )
    table.add_column("")
    short = [group.split()[0] for group in groups]
    for name in ("FLOPs", "visited", "search", *short, "mean", "95%"):
        table.add_column(name, justify="right")
    for one in finalists:
        shares = (one.flops, one.visited, one.value)
        mean = one.kept.mean
        kept = [one.kept.groups[group].value for group in groups]
        table.add_row(
            one.name.split(":")[0],
            *(f"{value:.3f}" for value in (*shares, *kept, mean.value)),
            f"{mean.low:.2f} to {mean.high:.2f}",
        )
    return table


def _verdict(finalists: Sequence[Finalist], ahead: Interval) -> str:
    named = finalists[-1]
    if len(finalists) == 1:
        return f"nothing that was tried keeps more on the texts of the search: {named.name}"
    return f"found minus best named, on held-out texts: {_shown(ahead)}"


def _shown(one: Interval) -> str:
    return f"{one.value:.4f} ({one.low:.4f} to {one.high:.4f})"
