"""Patterns of one sweep taken together: which parameters vary along a budget, and short names.

A series of a report holds the patterns that differ only in their budget. For a single method its
budget is in a few parameters; a union divides it among its parts, so that the numbers of several
parts vary together.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

METHOD_LABELS = {
    "full": "Full attention",
    "sa": "SA",
    "psa": "PSA",
    "swa": "SWA",
    "moba": "MoBA",
    "block_topk": "BlockTopK",
    "sinks": "sinks",
    "tail": "tail",
    "power": "PowerAttention",
    "vertical_slash": "vertical-slash",
    "xattention": "XAttention",
    "skip_softmax": "skip softmax",
    "flexprefill": "FlexPrefill",
    "sparge": "SpargeAttn",
    "permuted_blocks": "PBS-Attn",
    "prism": "Prism",
    "flashprefill": "FlashPrefill",
    "heads": "by head",
}
# What a sweep varies along the axis; any other parameter makes a series of its own.
AXIS_PARAMETERS = ("window", "block_size", "seed")
# BlockTopK has no window: its budget is the number of blocks and of local tokens. Others have
# numbers of blocks, or thresholds.
BUDGET = {
    "block_topk": ("topk", "local", "percent", *AXIS_PARAMETERS),
    "power": ("window",),
    "vertical_slash": ("vertical", "slash"),
    "xattention": ("topk", "threshold"),
    "skip_softmax": ("factor",),
    "flexprefill": ("gamma",),
    "sparge": ("threshold",),
    "permuted_blocks": ("topk", "threshold"),
    "prism": ("threshold",),
    "flashprefill": ("alpha",),
}
# MoBA within a union has small blocks, and a budget in their number; alone it has few large ones.
BUDGET_IN_UNION = BUDGET | {"moba": ("topk", *AXIS_PARAMETERS)}
# The same, but few large and many small blocks are told apart.
SPLIT = {"block_topk": ("topk", "local", "percent", "seed"), "moba": ("seed",)}
SPLIT_IN_UNION = SPLIT | {"moba": ("topk", "seed")}
# A parameter that a label gives as a bare number after the name.
MAIN = {
    **{"sinks": "size", "tail": "size", "heads": "patterns"},
    **{"swa": "window", "sa": "window", "psa": "window"},
}
# Shares of a budget are told apart in steps of this many percent.
SHARE_STEP = 5


@dataclass(frozen=True)
class Part:
    """One method of a pattern, with its parameters as text, in order."""

    method: str
    parameters: Mapping[str, str]

    def without(self, names: tuple[str, ...]) -> str:
        kept = [f"{key}={value}" for key, value in self.parameters.items() if key not in names]
        return ":".join([self.method, ",".join(kept)]) if kept else self.method

    def label(self, left_out: tuple[str, ...], note: str = "") -> str:
        """``SWA 60``, ``MoBA (topk=4)``; ``note`` follows the name."""
        name = METHOD_LABELS.get(self.method, self.method)
        main = MAIN.get(self.method, "")
        words = [name, note] if note else [name]
        if main in self.parameters and main not in left_out:
            words.append(self.parameters[main])
        rest = [
            f"{key}={value}"
            for key, value in self.parameters.items()
            if key not in left_out and key != main
        ]
        return " ".join(words) + (f" ({', '.join(rest)})" if rest else "")


@dataclass(frozen=True)
class Variant:
    """What the patterns of a series have in common: ``key`` compares, ``label`` is for readers."""

    key: str
    label: str


def read_parts(pattern: str) -> tuple[Part, ...]:
    """The parts of a pattern's canonical text form, such as ``sinks:size=4+swa:window=60``."""
    if pattern.startswith("heads{"):
        return (Part("heads", {"patterns": pattern[len("heads{") : -1]}),)
    parts = []
    for text in pattern.split("+"):
        method, _, listed = text.partition(":")
        pairs = [pair.partition("=") for pair in listed.split(",") if pair]
        parts.append(Part(method.strip(), {key.strip(): value for key, _, value in pairs}))
    return tuple(parts)


def family(pattern: str) -> str:
    """The methods of a pattern alone: ``sinks+swa+sa``."""
    return "+".join(part.method for part in read_parts(pattern))


def by_budget(pattern: str) -> Variant:
    """Patterns that differ in their budget only, however it is divided, are one variant."""
    parts = read_parts(pattern)
    budget = BUDGET_IN_UNION if len(parts) > 1 else BUDGET
    left_out = [budget.get(part.method, AXIS_PARAMETERS) for part in parts]
    return _variant(parts, left_out, [""] * len(parts))


def by_split(pattern: str) -> Variant:
    """As `by_budget`, but a budget that is divided in other shares, or over blocks of another
    size, is another variant."""
    parts = read_parts(pattern)
    windows = [_number(part.parameters.get("window")) for part in parts]
    total = sum(window or 0 for window in windows)
    several = sum(window is not None for window in windows) > 1
    notes = [
        f"{SHARE_STEP * round(100 * window / total / SHARE_STEP)}%"
        if several and window is not None
        else ""
        for window in windows
    ]
    split = SPLIT_IN_UNION if len(parts) > 1 else SPLIT
    left_out = [split.get(part.method, AXIS_PARAMETERS) for part in parts]
    return _variant(parts, left_out, notes)


def in_full(pattern: str) -> Variant:
    """Patterns that differ in their seeds only are one variant."""
    parts = read_parts(pattern)
    return _variant(parts, [("seed",)] * len(parts), [""] * len(parts))


def _variant(
    parts: tuple[Part, ...], left_out: Sequence[tuple[str, ...]], notes: Sequence[str]
) -> Variant:
    whole = list(zip(parts, left_out, notes, strict=True))
    key = "+".join(part.without(out) + (f"@{note}" if note else "") for part, out, note in whole)
    return Variant(key, " + ".join(part.label(out, note) for part, out, note in whole))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else None
